"""What each machine needs and how each launcher spells it: data and pure functions."""
