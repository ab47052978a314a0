"""Statistics over launches, the unit of repetition."""
