"""`jaxcomm sweep`, layer sweeps over the games: computed chunk by chunk into a run folder, drawn, and reported without a selection
effect."""
