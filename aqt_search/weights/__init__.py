"""The weights themselves: statistics, losses of their range, companding."""
