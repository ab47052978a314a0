"""The program: batches, model, schedule, steps, the training loop, checkpoints. It imports nothing of torchreg."""
