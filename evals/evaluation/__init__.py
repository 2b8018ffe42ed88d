"""`jaxcomm eval`: tasks of lm-evaluation-harness under one protocol or several, in a run folder.

run.json          the command that makes this run again, settings, versions, fingerprints
results.jsonl     one line per protocol, task and metric: value, interval, FLOPs, tokens, seconds
items.parquet     one row per protocol, task, question and filter: the answer and its scores
chunks/           the answers, batch by batch
"""
