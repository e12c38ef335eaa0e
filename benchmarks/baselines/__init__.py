"""What reflora is measured against, in plain torch. Nothing in here imports reflora."""
