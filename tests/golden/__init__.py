"""Golden cases: outputs of the original HSTU code, checked against what `serve` runs."""
