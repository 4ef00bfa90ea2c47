"""Plans for the tests."""

from rorchat.device import find_device
from rorchat.plan.budget import Plan, Request, make_plan


def make_test_plan(device: str, **options: object) -> Plan:
    return make_plan(Request(device=find_device(device), **options))


def within(factor: float, value: float, target: float) -> bool:
    return target / factor <= value <= target * factor
