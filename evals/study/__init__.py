"""The study: do activations carry content between real language models, and is it useful?

preregistration.md   questions, outcomes, tests and corrections; committed before any result
design               set-ups, sizes, and layers
measure              maps over the layers on one half of the items, conditions on the other half
run                  runs everything in a run folder, piece by piece
analysis             chosen cells, and the families of tests
report               the document
"""
