"""What reflora is measured against, in plain torch or PEFT. Nothing in here imports reflora."""
