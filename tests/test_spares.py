"""Which spare processes are started for the next group of workers. Pure; Ray is asked for none."""

from nanochat_ray.train.spares import START_TAKES_S, Spares


class Machines:
    """Machines that start what they are told, and a clock."""

    def __init__(self, cpus=2.0):
        self.now, self.started, self.answering, self.cpus = 100.0, [], True, cpus
        self.spares = Spares(self.start, lambda: self.now)

    def start(self, machine, environment, processes):
        assert environment == "env"
        if self.answering:
            self.started.append((machine["name"], processes))
        return self.answering

    def refill(self, **wanted):
        machines = {name: {"name": name, "Resources": {"CPU": self.cpus}} for name in wanted}
        self.spares.refill(machines, wanted, "env")


def test_spares_are_started_one_after_another_until_there_are_enough():
    machines = Machines()
    for _ in range(6):
        machines.refill(a=2, b=1, head=0)
        machines.now += START_TAKES_S / 2
    assert sorted(machines.started) == [("a", 1), ("a", 1), ("b", 1)]


def test_a_large_machine_starts_several_at_once():
    machines = Machines(cpus=20.0)
    for _ in range(3):
        machines.refill(a=8)
        machines.now += START_TAKES_S
    assert machines.started == [("a", 5), ("a", 3)]


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
