"""Models that come from elsewhere and go elsewhere, with equal logits and equal tokens.

nanochat_checkpoint  reads the public nanochat's checkpoints of two generations
nanochat_tokenizer   reads its tokenizer; pickled_data: the data of a pickle, none of which runs
stored_run           writes what was imported as a run
bundle, export       a model as one sealed folder; model_card: its README
hf_model, hf_tokenizer, hf/   the same in Hugging Face's terms
"""
