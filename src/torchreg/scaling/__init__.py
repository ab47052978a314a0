"""A scaling campaign: what to launch, one launch measured, and the statistics of many."""
