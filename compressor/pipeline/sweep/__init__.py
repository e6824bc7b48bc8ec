"""Many runs that share what they have in common."""
