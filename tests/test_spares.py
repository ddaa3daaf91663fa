"""Which spare processes are started for the next group of workers. Pure; Ray is asked for none."""

from nanochat_ray.train.spares import START_TAKES_S, Spares


class Machines:
    """Machines that start what they are told, and a clock."""

    def __init__(self):
        self.now, self.started, self.answering = 100.0, [], True
        self.spares = Spares(self.start, lambda: self.now)

    def start(self, machine, environment):
        if self.answering:
            self.started.append((machine, environment))
        return self.answering

    def refill(self, **wanted):
        self.spares.refill({name: name for name in wanted}, wanted, "env")


def test_spares_are_started_one_after_another_until_there_are_enough():
    machines = Machines()
    for _ in range(6):
        machines.refill(a=2, b=1, head=0)
        machines.now += START_TAKES_S / 2
    assert sorted(machines.started) == [("a", "env"), ("a", "env"), ("b", "env")]


def test_a_new_group_takes_the_spares_and_they_are_started_again():
    machines = Machines()
    machines.refill(a=1)
    machines.spares.taken({"a": 2})  # one of them was not a spare
    machines.now += START_TAKES_S
    machines.refill(a=1)
    assert len(machines.started) == 2


def test_a_machine_that_does_not_answer_is_asked_again():
    machines = Machines()
    machines.answering = False
    machines.refill(a=1)
    machines.answering = True
    machines.refill(a=1)
    assert len(machines.started) == 1
