"""The paper's experiments, one script each; README.md says what each needs and shows."""
