"""Which sources make up a mixture, and how much of each: for the demo, for a folder of chats, and for a big run."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from nanochat_ray.data.functions import documented_functions
from nanochat_ray.errors import UsageError, UserError
from nanochat_ray.storage import Folder
from nanochat_ray.tasks.arithmetic import arithmetic
from nanochat_ray.tasks.chat_files import load_chats
from nanochat_ray.tasks.conversations import Conversation, generator
from nanochat_ray.tasks.documentation import choose_functions, documentation
from nanochat_ray.tasks.gsm8k import GSM8K, load_gsm8k
from nanochat_ray.tasks.identity import identity, small_talk
from nanochat_ray.tasks.mixture import Mixture, Source, build_mixture
from nanochat_ray.tasks.multiple_choice import ARC_CHALLENGE, ARC_EASY, MMLU, load_arc, load_mmlu
from nanochat_ray.tasks.public_sets import PublicSet
from nanochat_ray.tasks.spelling import counting, spelling
from nanochat_ray.tasks.words import FEW_WORDS, WORDS

PUBLIC_CHATS = "HuggingFaceTB/smol-smoltalk"
GENERATED_TESTS = 200  # test questions of each generated set
PUBLIC_TESTS = 200  # test questions of each public set; whole test sets are for the evaluation jobs

Generate = Callable[[int, str, int], list[Conversation]]  # (seed, split, count)
Load = Callable[[str, Folder | None], list[Conversation]]  # (split, tasks folder, or None for the hub)


@dataclass(frozen=True)
class MixtureSizes:
    """The dials of a mixture that is made of chats, public sets and generated sets.

    Epochs may be fractions: 0.5 takes a random half, 0 leaves a set out. The generated sets are counted in questions.
    """

    chat_epochs: float = 1.0
    mmlu_epochs: float = 3.0
    gsm8k_epochs: float = 4.0
    arc_epochs: float = 1.0
    spelling: int = 1_000
    counting: int = 1_000
    arithmetic: int = 1_000
    identity: int = 500
    small_talk: int = 200


PUBLIC_SIZES = MixtureSizes(spelling=20_000, counting=20_000, arithmetic=10_000, identity=2_000, small_talk=500)


def mixture_of(spec: str, tasks: str | None = None, seed: int = 42) -> Mixture:
    """`demo`, `hub`, or where chats are, which are mixed with the sets of a tasks folder.

    Raises:
        UserError: as folder_mixture and public_mixture.
        UsageError: a tasks folder for a mixture that takes none.
    """
    if spec in ("demo", "hub"):
        if tasks is not None:
            raise UsageError(f"--tasks goes with a folder of chats, not with --sft {spec}")
        return demo_mixture(seed) if spec == "demo" else public_mixture(seed)
    return folder_mixture(spec, tasks, seed)


def tasks_of(spec: str, tasks: str | None) -> Folder | None:
    """Where the task sets of a mixture are: the folder that was given, or the one beside its chats; None: nowhere.

    Raises:
        UserError: the chats are named by a path, and there is nothing.
    """
    if tasks is not None:
        return Folder.at(tasks)
    if spec.startswith(("/", ".", "~")) and not Folder.at(spec).exists():
        raise UserError(f"there is nothing at {spec}; check --sft")
    beside = Folder.at(Folder.at(spec).uri.rpartition("/")[0]) / "tasks"
    return beside if spec not in ("demo", "hub") and beside.exists() else None


def demo_mixture(seed: int) -> Mixture:
    """The mixture of the embedded demo, about 300,000 tokens: what a tiny model can learn in a minute or two.

    Few answers, short and always said the same way; small numbers; a small set of words. The functions asked about
    are those of the Python that runs this, as in the demo corpus.
    """
    functions = choose_functions(documented_functions(), 160)
    about_functions = partial(documentation, functions)
    return build_mixture(
        [
            _generated("documentation", about_functions, seed, 16 * len(functions), len(functions)),
            _generated("arithmetic", partial(arithmetic, max_operand=99), seed, 2_500, 100),
            _generated("counting", partial(counting, words=FEW_WORDS), seed, 1_500, 100),
            _generated("identity", identity, seed, 800, 30),
            _generated("small talk", small_talk, seed, 500, 16),
        ],
        seed,
    )


def folder_mixture(path: str, tasks: str | None = None, seed: int = 42, sizes: MixtureSizes | None = None) -> Mixture:
    """Chats (folder, file, URI, hub name), the generated sets, and GSM8K, MMLU and ARC where a tasks folder has them.

    Without `tasks` a folder called `tasks` beside the chats is used if there is one.

    Raises:
        UserError: no or bad chats, a bad task file, or a given tasks folder that holds none of the sets.
    """
    sizes = sizes or MixtureSizes()
    chats = Source("chats", *load_chats(path), sizes.chat_epochs)
    place = tasks_of(path, tasks)
    public = [] if place is None else _public_sources(place, seed, sizes)
    if tasks is not None and not public:
        raise UserError(
            f"no task sets in {tasks}: expected {GSM8K.folder}, {MMLU.folder}, {ARC_EASY.folder} or the like"
        )
    return build_mixture([chats, *public, *_generated_sources(seed, sizes)], seed)


def public_mixture(seed: int, sizes: MixtureSizes = PUBLIC_SIZES) -> Mixture:
    """The mixture of big runs, from the hub: SmolTalk chats, MMLU, GSM8K, ARC, and the generated sets.

    Raises:
        UserError: a set cannot be had from the hub.
    """
    chats = Source("chats", *load_chats(PUBLIC_CHATS), sizes.chat_epochs)
    return build_mixture([chats, *_public_sources(None, seed, sizes), *_generated_sources(seed, sizes)], seed)


def _public_sources(tasks: Folder | None, seed: int, sizes: MixtureSizes) -> list[Source]:
    """The sets that have a weight and that the tasks folder has; all come from the hub when it is None."""
    recipes: list[tuple[str, PublicSet, float, str, Load]] = [
        ("gsm8k", GSM8K, sizes.gsm8k_epochs, "train", load_gsm8k),
        ("mmlu", MMLU, sizes.mmlu_epochs, "auxiliary_train", load_mmlu),
        ("arc-easy", ARC_EASY, sizes.arc_epochs, "train", partial(load_arc, ARC_EASY)),
        ("arc-challenge", ARC_CHALLENGE, sizes.arc_epochs, "train", partial(load_arc, ARC_CHALLENGE)),
    ]

    def some_tests(name: str, tests: list[Conversation]) -> list[Conversation]:
        return generator(seed, "tests of", name).sample(tests, min(PUBLIC_TESTS, len(tests)))

    return [
        Source(name, load(split, tasks), some_tests(name, load("test", tasks)), epochs)
        for name, public_set, epochs, split, load in recipes
        if epochs > 0 and (tasks is None or (tasks / public_set.folder).exists())
    ]


def _generated_sources(seed: int, sizes: MixtureSizes) -> list[Source]:
    sources = [
        _generated("spelling", partial(spelling, words=WORDS), seed, sizes.spelling),
        _generated("counting", partial(counting, words=WORDS), seed, sizes.counting),
        _generated("arithmetic", arithmetic, seed, sizes.arithmetic),
        _generated("identity", identity, seed, sizes.identity, 30),
        _generated("small talk", small_talk, seed, sizes.small_talk, 16),
    ]
    return [source for source in sources if source.train]


def _generated(name: str, generate: Generate, seed: int, count: int, tests: int = GENERATED_TESTS) -> Source:
    return Source(name, generate(seed, "train", count), generate(seed, "test", tests))
