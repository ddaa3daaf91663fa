"""Measurements behind `python -m jobs.bench`: each beside a limit or a peer that was measured in the same run.

measurement       medians, how busy the machine was, fresh processes, the table
sizes             the model, text and tokenizer of those that need them
packing_bench     best fit beside a plain scan
data_bench        text → tokens → rows → micro-batches, without and with Ray Data
train_bench       the training step beside the machine's matrix multiplication, and the cost of Ray around it
bare_training     the training step in a process of its own, without Ray
decode_bench      reading a prompt and writing a reply beside the machine's memory
checkpoint_bench  the step that triggers a checkpoint beside its neighbours
recovery_bench    how long training stands still when machines go and come (spot_cluster, spot_run)
spot_bench        a real availability trace acted out: goodput
"""
