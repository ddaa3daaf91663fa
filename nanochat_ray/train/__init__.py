"""One optimizer step after the other, and everything that lets the next process go on where this one stopped.

step         forward, backward, agreement between workers, update (plain torch)
loop         steps, evaluations, checkpoints (plain torch, takes callables)
checkpoint   folders that appear whole, verify themselves and load under any world size
events       JSONL and TensorBoard
progress     the live line, read from the events
job          what a stage is, as plain data
worker       one Ray Train worker running the loop
ray_trainer  the group of workers, fed by Ray Data
elastic      which machines a group may use, and when it leaves for a new size
"""
