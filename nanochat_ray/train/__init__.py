"""One optimizer step after the other, and everything that lets the next process go on where this one stopped.

step         forward, backward, agreement between workers, update (plain torch)
loop         steps, evaluations, checkpoints (plain torch, takes callables)
cadence      when to look at the model and when to save it
checkpoint   folders that appear whole, verify themselves and load under any world size
saver        checkpoints off the critical path, in a thread
lease        one writer per stage
events       JSONL and TensorBoard
ledger       what every worker-second went to, from the events
progress     the live line, read from the events
watchdog     ends a worker that hangs, and leaves its stacks
reports      what workers leave word of for the driver and the next group
restarts     when a run that keeps failing should end; out_of_memory: which number to lower
compile_cache  compiled kernels, kept with the run
job          what a stage is, as plain data; origin: where its weights came from, if they were imported
worker       one Ray Train worker running the loop
ray_trainer  the group of workers, fed by Ray Data
elastic      which machines a group may use, and when it leaves for a new size
spares       processes that wait, with every library loaded, for the next group
"""
