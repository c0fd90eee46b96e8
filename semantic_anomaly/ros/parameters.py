"""The settings table as ROS parameters: declared, checked as a whole, then taken.

Used by the executor's thread alone.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import Any

from rcl_interfaces.msg import (
    FloatingPointRange,
    IntegerRange,
    ParameterDescriptor,
    SetParametersResult,
)
from rclpy.exceptions import InvalidTopicNameException
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.validate_topic_name import validate_topic_name

from semantic_anomaly.errors import SemanticAnomalyError, SettingsError, UnknownNameError
from semantic_anomaly.settings import Settings, camera_setting_specs, setting_specs
from semantic_anomaly.settings_schema import SettingSpec

# Parameters that rclpy itself declares or understands.
_FOREIGN = ("use_sim_time", "start_type_description_service")
_FOREIGN_PREFIXES = ("qos_overrides.",)

_ARRAYS = {
    float: Parameter.Type.DOUBLE_ARRAY,
    int: Parameter.Type.INTEGER_ARRAY,
    str: Parameter.Type.STRING_ARRAY,
}


class NodeParameters:
    """The parameters of a node: all may change until `freeze`, afterwards the live ones.

    Args:
        node: declares the parameters.
        apply: takes new live settings, or raises a SemanticAnomalyError and changes nothing.
    """

    def __init__(self, node: Node, apply: Callable[[Settings], None]) -> None:
        self._node = node
        self._apply = apply
        self._frozen = False
        self._declaring = False
        self._problems: dict[str, SemanticAnomalyError] = {}
        for name, spec in setting_specs().items():
            self._declare(name, spec)
        self._declare_cameras(self._value("cameras"))
        node.add_on_set_parameters_callback(self._on_set)

    def settings(self) -> Settings:
        """Return the settings that the parameters make.

        Raises:
            UnknownNameError: a parameter was given that is no setting.
            SettingsError: a value that was given cannot be taken.
        """
        known = {name for name, _ in self._specs()}
        for name in self._given():
            foreign = name in _FOREIGN or name.startswith(_FOREIGN_PREFIXES)
            if name not in known and not foreign:
                raise UnknownNameError("parameter", name, known)
        for name, problem in self._problems.items():
            if name in known:
                raise problem
        settings = Settings.from_parameters(self._values())
        _check_topics(settings)
        return settings

    def freeze(self) -> None:
        """Refuse all changes but those of live settings, from configure on."""
        self._frozen = True

    def thaw(self) -> None:
        """Take any change again, after cleanup."""
        self._frozen = False

    def _given(self) -> dict[str, Parameter]:
        # rclpy keeps what YAML and command line gave here and tells nobody else of it.
        return dict(self._node._parameter_overrides)

    def _specs(self) -> Iterator[tuple[str, SettingSpec]]:
        yield from setting_specs().items()
        for camera in self._value("cameras"):
            for key, spec in camera_setting_specs().items():
                yield f"{camera}.{key}", spec

    def _value(self, name: str) -> Any:
        value = self._node.get_parameter(name).value
        return (
            list(value) if value is not None and not isinstance(value, str | int | float) else value
        )

    def _values(self) -> dict[str, Any]:
        return {name: self._value(name) for name, _ in self._specs()}

    def _declare(self, name: str, spec: SettingSpec) -> None:
        value = spec.default
        given = self._given().get(name)
        if given is not None:
            # An empty list in YAML has no type and arrives as nothing.
            found = () if given.value is None and spec.is_list else given.value
            try:
                value = spec.check(found, name)
            except SemanticAnomalyError as problem:
                # Refused at configure, where somebody waits for the answer.
                self._problems[name] = problem
        self._declaring = True
        try:
            plain = list(value) if spec.is_list else value
            self._node.declare_parameter(name, plain, _descriptor(spec), ignore_override=True)
            if spec.is_list and not value:
                empty = Parameter(name, _ARRAYS[spec.element], [])
                self._node.set_parameters([empty])
        finally:
            self._declaring = False

    def _declare_cameras(self, cameras: list[str]) -> None:
        for camera in cameras:
            for key, spec in camera_setting_specs().items():
                name = f"{camera}.{key}"
                try:
                    declared = self._node.has_parameter(name)
                    if not declared:
                        self._declare(name, spec)
                except Exception as error:
                    problem = SettingsError(f"setting 'cameras': '{camera}' is no name: {error}")
                    self._problems["cameras"] = problem
                    return

    def _on_set(self, parameters: list[Parameter]) -> SetParametersResult:
        if self._declaring:
            return SetParametersResult(successful=True)
        try:
            self._take({parameter.name: parameter.value for parameter in parameters})
        except SemanticAnomalyError as error:
            return SetParametersResult(successful=False, reason=str(error))
        except Exception as error:
            self._node.get_logger().error(traceback.format_exc())
            return SetParametersResult(successful=False, reason=f"internal error: {error!r}")
        return SetParametersResult(successful=True)

    def _take(self, changes: dict[str, Any]) -> None:
        specs = dict(self._specs())
        changes = {name: value for name, value in changes.items() if name in specs}
        if not changes:
            return
        current = self._values()
        checked = {name: specs[name].check(value, name) for name, value in changes.items()}
        if self._frozen:
            live = sorted(name for name, spec in specs.items() if spec.live)
            for name, value in checked.items():
                if not specs[name].live and value != specs[name].check(current[name], name):
                    raise SettingsError(
                        f"parameter '{name}' is read-only after configure; "
                        f"live ones: {', '.join(live)}"
                    )
        added = [c for c in checked.get("cameras", ()) if c not in current["cameras"]]
        kept = {k: v for k, v in {**current, **changes}.items() if _belongs(k, checked)}
        settings = Settings.from_parameters(kept)
        if self._frozen:
            self._apply(settings)
        self._declare_cameras(added)
        for name in changes:
            self._problems.pop(name, None)


def _check_topics(settings: Settings) -> None:
    """Refuse names that ROS would refuse when the node is activated.

    Raises:
        SettingsError: a topic's name is malformed, or an image topic is missing.
    """
    for camera, own in settings.camera_settings.items():
        for key in ("image_topic", "camera_info_topic", "depth_topic"):
            topic = getattr(own, key)
            if not topic and key != "image_topic":
                continue
            try:
                validate_topic_name(topic)
            except InvalidTopicNameException as error:
                told = " ".join(str(error).split())
                raise SettingsError(f"setting '{camera}.{key}': {told}") from error


def _belongs(name: str, checked: dict[str, Any]) -> bool:
    camera, dot, _ = name.partition(".")
    return not dot or "cameras" not in checked or camera in checked["cameras"]


def _descriptor(spec: SettingSpec) -> ParameterDescriptor:
    # Dynamic: YAML has no typed empty list, and people write 0 for 0.0. The table checks types.
    when = "live" if spec.live else "read-only after configure"
    descriptor = ParameterDescriptor(
        description=f"{spec.description} [{when}]", dynamic_typing=True
    )
    if spec.choices:
        descriptor.additional_constraints = f"one of: {', '.join(spec.choices)}"
    if spec.is_list or spec.minimum is None or spec.maximum is None:
        return descriptor
    if spec.element is int:
        low, high = int(spec.minimum), int(spec.maximum)
        descriptor.integer_range = [IntegerRange(from_value=low, to_value=high, step=1)]
    else:
        span = FloatingPointRange(from_value=float(spec.minimum), to_value=float(spec.maximum))
        descriptor.floating_point_range = [span]
    return descriptor
