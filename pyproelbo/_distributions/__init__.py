"""Properties of distributions: what they wrap, families, marginals, closed forms, draws."""
