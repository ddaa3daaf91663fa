"""Finetuning data: chats read from files and public sets, question sets that are generated, and how they are mixed.

Owns what a conversation says. How it becomes tokens is `nanochat_ray.chat`; how tokens become rows is
`nanochat_ray.stream`.
"""
