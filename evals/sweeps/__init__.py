"""`jaxcomm sweep`: layer sweeps over the games. They are computed chunk by chunk in a run folder, drawn, and reported
without selection bias."""
