"""What reflora is measured against, in plain torch or through PEFT. Nothing in here imports reflora.

One optimizer a file, over `pairs` of factors A `[r, n_in]` and B `[n_out, r]` of an update `scaling * B @ A`. Work on
`[r, r]` matrices is done for all pairs of a rank at once, which the published codes do pair by pair. README.md says
what each was checked against.
"""
