"""The way from requests to batches for the replicas, and from their scores to replies."""
