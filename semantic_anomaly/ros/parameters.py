"""The settings as ROS parameters: declared from the table, checked together, then applied.

Used by the executor's thread only.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
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
from semantic_anomaly.settings import (
    Settings,
    camera_override_specs,
    camera_setting_specs,
    read_settings_file,
    setting_specs,
)
from semantic_anomaly.settings_schema import (
    FOREIGN,
    FOREIGN_PREFIXES,
    SettingSpec,
    read_parameters_yaml,
)

# Values of launch arguments, which launch_ros writes to a file of its own: no user wrote it.
_LAUNCH_FILE_PREFIX = "launch_params_"

_ARRAYS = {
    float: Parameter.Type.DOUBLE_ARRAY,
    int: Parameter.Type.INTEGER_ARRAY,
    str: Parameter.Type.STRING_ARRAY,
}


class NodeParameters:
    """The parameters of the node. All may change until `frozen` is set, then the live ones only.

    Live settings are also declared for each camera ('front.threshold'), without a value: the common
    setting is in force until the parameter is set. A setting without a default has no value either.

    Args:
        node: declares the parameters.
        apply: takes changed live settings, or raises a SemanticAnomalyError and changes nothing.
    """

    def __init__(self, node: Node, apply: Callable[[Settings], None]) -> None:
        self._node = node
        self._apply = apply
        self.frozen = False
        self._declaring = False
        # Values from YAML and command line; rclpy has no public access to them.
        self._initial: Mapping[str, Parameter] = node._parameter_overrides
        self._declared: set[str] = set()
        self._errors: dict[str, SemanticAnomalyError] = {}
        self._declare_all()
        node.add_on_set_parameters_callback(self._on_set)
        if hasattr(node, "add_post_set_parameters_callback"):  # not in Humble
            node.add_post_set_parameters_callback(self._after_set)

    def settings(self) -> Settings:
        """Return the settings that the parameters describe.

        Raises:
            UnknownNameError: a parameter is not a setting.
            SettingsError: a value of the wrong type or out of bounds.
        """
        # A camera may have been named, or a parameter deleted, since the declaration.
        self._declare_all()
        known = self._specs()
        for name in self._initial:
            foreign = name in FOREIGN or name.startswith(FOREIGN_PREFIXES)
            if name not in known and not foreign:
                raise UnknownNameError("parameter", name, known)
        for name, error in self._errors.items():
            if name in known:
                raise error
        own_name = self._node.get_fully_qualified_name()
        values = _with_resolved_paths({name: self._value(name) for name in known}, own_name)
        settings = Settings.from_parameters(values)
        _check_topics(settings)
        return settings

    def _specs(self) -> dict[str, SettingSpec]:
        """Return the row of every parameter by its name, with the prefix of its camera."""
        specs = setting_specs()
        for camera in self._value("cameras"):
            specs |= _camera_specs(camera)
        return specs

    def _value(self, name: str) -> Any:
        """Return the value of a parameter, None if it has none or was deleted."""
        value = self._node.get_parameter_or(name).value
        return value if value is None or isinstance(value, str | int | float) else list(value)

    def _declare(self, name: str, spec: SettingSpec) -> None:
        value = None if _is_override(name) else spec.default
        initial = self._initial.get(name)
        # A deleted parameter is declared again without its initial value.
        if initial is not None and name not in self._declared:
            # An empty list in YAML has no type and arrives as None.
            initial_value = () if initial.value is None and spec.is_list else initial.value
            try:
                value = _checked(name, initial_value, spec)
            except SemanticAnomalyError as error:
                # Raised at configure, where it reaches the user.
                self._errors[name] = error
        self._declared.add(name)
        self._declaring = True
        try:
            plain = list(value) if isinstance(value, tuple) else value
            descriptor = _descriptor(name, spec)
            self._node.declare_parameter(name, plain, descriptor, ignore_override=True)
            if spec.is_list and not value:
                self._node.set_parameters([Parameter(name, _ARRAYS[spec.element], [])])
        finally:
            self._declaring = False

    def _declare_all(self) -> None:
        """Declare the parameters that are not declared yet, those of the cameras last."""
        for name, spec in setting_specs().items():
            if not self._node.has_parameter(name):
                self._declare(name, spec)
        self._declare_cameras(self._value("cameras"))

    def _declare_cameras(self, cameras: Iterable[str]) -> None:
        """Declare the parameters of cameras that are not declared yet."""
        for camera in cameras:
            for name, spec in _camera_specs(camera).items():
                try:
                    if not self._node.has_parameter(name):
                        self._declare(name, spec)
                except Exception as error:
                    self._errors["cameras"] = SettingsError(
                        f"setting 'cameras': '{camera}' is not a valid name: {error}"
                    )
                    return

    def _on_set(self, parameters: list[Parameter]) -> SetParametersResult:
        try:
            if not self._declaring:
                self._change({parameter.name: parameter.value for parameter in parameters})
        except SemanticAnomalyError as error:
            return SetParametersResult(successful=False, reason=str(error))
        except Exception as error:
            self._node.get_logger().error(traceback.format_exc())
            return SetParametersResult(successful=False, reason=f"internal error: {error!r}")
        return SetParametersResult(successful=True)

    def _after_set(self, _: list[Parameter]) -> None:
        # Deleting a value removes the declaration; the parameter may be set again.
        if not self._declaring:
            self._declare_all()

    def _change(self, changes: dict[str, Any]) -> None:
        specs = self._specs()
        changes = {name: value for name, value in changes.items() if name in specs}
        if not changes:
            return
        current = {name: self._value(name) for name in specs}
        checked = {name: _checked(name, value, specs[name]) for name, value in changes.items()}
        if self.frozen:
            for name, value in checked.items():
                if not specs[name].live and value != _checked(name, current[name], specs[name]):
                    live = ", ".join(sorted(camera_override_specs()))
                    raise SettingsError(
                        f"parameter '{name}' is read-only after configure; these may change, also "
                        f"for one camera: {live}"
                    )
        cameras = checked.get("cameras", current["cameras"])
        settings = Settings.from_parameters(
            {
                name: value
                for name, value in {**current, **changes}.items()
                if "." not in name or name.partition(".")[0] in cameras
            }
        )
        if self.frozen:
            self._apply(settings)
        # Before rclpy stores the names, so that they can be set at once.
        self._declare_cameras(camera for camera in cameras if camera not in current["cameras"])
        for name in changes:
            self._errors.pop(name, None)


def _camera_specs(camera: str) -> dict[str, SettingSpec]:
    specs = {**camera_setting_specs(), **camera_override_specs()}
    return {f"{camera}.{name}": spec for name, spec in specs.items()}


def _is_override(name: str) -> bool:
    return "." in name and name.rpartition(".")[2] in camera_override_specs()


def _checked(name: str, value: Any, spec: SettingSpec) -> Any:
    """Return a checked value; an override may have none.

    Raises:
        SettingsError: naming the parameter.
    """
    return None if value is None and _is_override(name) else spec.check(value, name)


def _check_topics(settings: Settings) -> None:
    """Check the topic names, which ROS would refuse only when the node is activated.

    Raises:
        SettingsError: a malformed name, or no image topic.
    """
    for camera, camera_settings in settings.camera_settings.items():
        for key in ("image_topic", "camera_info_topic", "depth_topic"):
            try:
                if (topic := getattr(camera_settings, key)) or key == "image_topic":
                    validate_topic_name(topic)
            except InvalidTopicNameException as error:
                text = " ".join(str(error).split())
                raise SettingsError(f"setting '{camera}.{key}': {text}") from error


def _descriptor(name: str, spec: SettingSpec) -> ParameterDescriptor:
    # Dynamic: YAML has no typed empty list, and users write 0 for 0.0. The row checks the type.
    scope = " Without a value: the common setting." if _is_override(name) else ""
    changes = "live" if spec.live else "read-only after configure"
    descriptor = ParameterDescriptor(
        description=f"{spec.description}{scope} [{changes}]", dynamic_typing=True
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


def _with_resolved_paths(values: Mapping[str, Any], node: str) -> dict[str, Any]:
    """Return parameters in which relative paths from --params-file are relative to that file.

    The commands read a parameter file in the same way. rclpy does not tell which file a value comes
    from, so a value is taken to come from a file that has the same value.
    """
    resolved = dict(values)
    for option, argument in zip(sys.argv, sys.argv[1:], strict=False):
        path = Path(argument)
        if option != "--params-file" or path.name.startswith(_LAUNCH_FILE_PREFIX):
            continue
        try:
            written, absolute = read_parameters_yaml(path, node), read_settings_file(path, node)
        except SettingsError:
            # Parameters of other nodes only.
            continue
        for name, value in written.items():
            if name in resolved and resolved[name] == value:
                resolved[name] = absolute[name]
    return resolved
