"""From units to training rows: exactly once, in one order, whatever the number of workers.

packing, chat_packing   documents or conversations → rows (pure, one unit at a time)
order                   which unit comes when, which worker runs which micro-batch (pure)
cursor                  where the run stands; saved whole, restored whole
rows                    one unit → its rows, and the row sequence without Ray
ray_stream              the same sequence through Ray Data
head_start              its first micro-batches, made by the workers until Ray Data has caught up
"""
