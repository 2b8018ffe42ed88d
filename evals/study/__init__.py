"""The study: do activations carry content between real language models, and is it of use?

preregistration.md   questions, outcomes, tests and corrections; committed before any result
design               set-ups, sizes, and which layers are looked at
measure              maps over the layers on one half of the items, conditions on the other half
run                  everything in a run folder, piece by piece
analysis             chosen cells, the families of tests, what carries
report               the document
"""
