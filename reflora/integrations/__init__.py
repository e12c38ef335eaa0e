"""PEFT, transformers and the published package's names. Nothing here imports transformers but trainer.py."""
