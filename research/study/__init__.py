"""Re-test the paper's claims with small models, and write the results as a document."""
