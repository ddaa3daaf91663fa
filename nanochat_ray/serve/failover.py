"""Goes on with a reply elsewhere when the replica that writes it is lost or gives it up. No Ray.

Who reads the reply knows its prompt, its parameters and the tokens so far, and that is all that a reply depends on: it
is asked for again with the tokens it has. Nothing is lost, repeated or changed; the reader sees a pause.
"""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from nanochat_ray.engine.reply import Piece
from nanochat_ray.serve.backend import GenerationFailed, ReplyRequest, Update, Waiting

OTHER_MODEL_PATIENCE_S = 60.0  # while a model is replaced, replicas of the old and the new one run side by side
PAUSE_S = 0.2  # Serve's router hears a moment later than we do that a replica is gone
MOST_LOSSES = 3  # in a row without a token between them: then it may be the reply that kills replicas

Bundles = Callable[[ReplyRequest], AsyncGenerator[list[Update], None]]


class OtherModel(Exception):
    """The replica that was asked has another model than the one whose reply it is."""


class ReplicaLost(Exception):
    """The replica that wrote a reply is gone, or does not want to go on."""


async def continued(bundles: Bundles, request: ReplyRequest) -> AsyncGenerator[Update, None]:
    """The whole reply, whoever writes it.

    Args:
        bundles: begins a reply, or goes on behind what is `said`, on some replica. Ends after the piece with `finish`;
            an earlier end means that the replica hands the reply over.

    Raises:
        GenerationFailed: MOST_LOSSES replicas in a row were lost before they added a token, or no replica has the
            request's model any more.
    """
    losses = others = 0
    session = request.session
    for attempt in itertools.count():
        if attempt:  # with another session, which leads to another replica: the same may not have gone yet
            request = replace(request, session=f"{session} {attempt}")
        moved = True
        async with aclosing(bundles(request)) as parts:
            try:
                async for bundle in parts:
                    tokens = [token for update in bundle if isinstance(update, Piece) for token in update.tokens]
                    if tokens:
                        request, losses = replace(request, said=(*request.said, *tokens)), 0
                    for update in bundle:
                        yield update
                        if isinstance(update, Piece) and update.finish:
                            return
            except ReplicaLost:
                losses += 1
            except OtherModel:
                others, moved = others + 1, False
        if losses >= MOST_LOSSES:
            raise GenerationFailed(f"{losses} replicas in a row were lost while they wrote this reply")
        if others * PAUSE_S >= OTHER_MODEL_PATIENCE_S:
            raise GenerationFailed("the model was replaced while this reply was written")
        if moved:
            yield Waiting("moved")
        await asyncio.sleep(PAUSE_S)
