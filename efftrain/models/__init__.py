"""Model families, plain torch modules."""
