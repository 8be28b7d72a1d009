"""What users build networks of."""
