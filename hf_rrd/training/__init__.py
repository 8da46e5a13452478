"""What a run needs: the comparison, the data, checkpoints and several processes."""
