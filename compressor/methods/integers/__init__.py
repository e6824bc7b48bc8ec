"""Integer codes, of weights and of factors."""
