"""Predictions for many world sizes, without training."""
