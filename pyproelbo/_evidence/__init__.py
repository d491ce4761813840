"""How large log p(x) is, beside its bound."""
