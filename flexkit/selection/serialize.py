"""Policies as plain JSON, and back."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from flexkit.errors import PolicyError
from flexkit.selection import policies
from flexkit.selection.policy import FunctionPolicy, Policy
from flexkit.selection.schedule import Schedule

_BUILT_IN: dict[str, type[Any]] = {name: getattr(policies, name) for name in policies.__all__}


def policy_to_dict(policy: Policy | Schedule) -> dict[str, Any]:
    """Describe a policy or schedule in plain JSON types.

    Parameters
    ----------
    policy : Policy or Schedule
        One that flexkit does not bring along, a function or a subclass, is described by its name only.

    Returns
    -------
    dict
        Its ``"type"`` and its parameters, nested for compositions.

    Raises
    ------
    PolicyError
        If ``policy`` is neither.

    Examples
    --------
    >>> from flexkit.selection import Border
    >>> policy_to_dict(~Border(2))
    {'type': 'Complement', 'policy': {'type': 'Border', 'width': 2}}
    """
    if isinstance(policy, Schedule):
        by_layer = {str(layer): policy_to_dict(part) for layer, part in policy.policies.items()}
        return {"type": "Schedule", "policies": by_layer}
    if isinstance(policy, FunctionPolicy):
        return {"type": "custom", "name": policy.name}
    if not isinstance(policy, Policy):
        raise PolicyError(f"expected a Policy or Schedule, got {type(policy).__name__} {policy!r}")
    name = type(policy).__name__
    if _BUILT_IN.get(name) is not type(policy):
        return {"type": "custom", "name": type(policy).__qualname__}
    values = {field.name: getattr(policy, field.name) for field in fields(_BUILT_IN[name])}
    return {"type": name} | {
        key: policy_to_dict(value) if isinstance(value, Policy) else value for key, value in values.items()
    }


def policy_from_dict(description: Mapping[str, Any]) -> Policy | Schedule:
    """Build the policy or schedule that :func:`policy_to_dict` described.

    Parameters
    ----------
    description : collections.abc.Mapping
        Its ``"type"`` and its parameters.

    Returns
    -------
    Policy or Schedule

    Raises
    ------
    PolicyError
        If the description is not of one of flexkit's own policies, or has wrong parameters.

    Examples
    --------
    >>> policy_from_dict({"type": "TopK", "k": 16})
    TopK(k=16)
    """
    if not isinstance(description, Mapping) or not isinstance(description.get("type"), str):
        raise PolicyError(f'expected a policy as a mapping with a "type", got {description!r}')
    name = description["type"]
    parameters = {key: value for key, value in description.items() if key != "type"}
    if name == "Schedule":
        return _schedule_from_dict(parameters)
    if name not in _BUILT_IN:
        named = parameters.get("name", "") if name == "custom" else name
        raise PolicyError(
            f"the policy {named!r} is not one of flexkit's own ({', '.join(_BUILT_IN)}) and cannot be "
            "rebuilt from its description: make it yourself and pass policy=..."
        )
    parts = {key: policy_from_dict(value) if isinstance(value, Mapping) else value for key, value in parameters.items()}
    try:
        policy: Policy = _BUILT_IN[name](**parts)
    except TypeError as error:
        expected = ", ".join(field.name for field in fields(_BUILT_IN[name])) or "none"
        raise PolicyError(f"{name}: got the parameters {sorted(parts)}, expected: {expected}") from error
    return policy


def _schedule_from_dict(parameters: Mapping[str, Any]) -> Schedule:
    by_layer = parameters.get("policies")
    if not isinstance(by_layer, Mapping) or not all(str(layer).isdecimal() for layer in by_layer):
        raise PolicyError(f'Schedule: expected "policies" as a mapping from layers, got {by_layer!r}')
    # Schedule itself refuses the one thing that is no policy: a schedule within a schedule.
    policies: dict[int, Any] = {int(layer): policy_from_dict(part) for layer, part in by_layer.items()}
    return Schedule(policies)
