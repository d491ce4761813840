"""What is known of distributions: what they wrap, families, marginals, closed forms, draws."""
