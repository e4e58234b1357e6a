"""What a phone says of itself: model, Android, processor, battery, heat. What it does not say is None."""

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tflite.adb.client import Adb

# android.os.PowerManager, THERMAL_STATUS_*: at 1 Android throttles, if only as far as nobody notices.
THERMAL_NAMES = ("NONE", "LIGHT", "MODERATE", "SEVERE", "CRITICAL", "EMERGENCY", "SHUTDOWN")
_POLICIES = "mobiatt-policies"
# One line per group of cores that share a clock: cores|governor|most that the silicon does|most that is allowed (kHz).
_POLICY_SCRIPT = (
    "for p in /sys/devices/system/cpu/cpufreq/policy*; do [ -d $p ] || continue; "
    "echo $(cat $p/related_cpus 2>/dev/null)'|'$(cat $p/scaling_governor 2>/dev/null)'|'"
    "$(cat $p/cpuinfo_max_freq 2>/dev/null)'|'$(cat $p/scaling_max_freq 2>/dev/null); done"
)
_STATE_SCRIPT = f"dumpsys thermalservice 2>/dev/null; echo; echo {_POLICIES}; {_POLICY_SCRIPT}"
_ABOUT_SCRIPTS = {
    "properties": "getprop",
    "battery": "dumpsys battery",
    "low_power": "settings get global low_power",
    "cores": "cat /sys/devices/system/cpu/present",
    "count": "nproc",
    "power": "dumpsys power 2>/dev/null | grep mWakefulness=",
}
# Why a latency does not count although no heat was seen; `PhoneState.throttling` may add what is missing.
UNREPORTED = "the phone no longer reports its heat"
# benchmark_model's default on a GPU, which is asked for explicitly.
_GPU_PRECISION = "float16 allowed"


@dataclass(frozen=True)
class Cluster:
    """Cores that share a clock. Frequencies in MHz: what the silicon does, and what is allowed now."""

    cores: str
    governor: str | None
    max_mhz: int | None
    allowed_mhz: int | None


@dataclass(frozen=True)
class PhoneState:
    """What changes with heat.

    Attributes:
        thermal_status: 0 to 6, see `THERMAL_NAMES`; None before Android 10, and where Android has no thermal driver.
        sensors: temperatures in degrees Celsius by sensor.
        overridden: somebody has set the thermal status by hand.
        clusters: the processor's groups of cores.
    """

    thermal_status: int | None
    sensors: Mapping[str, float]
    overridden: bool
    clusters: tuple[Cluster, ...]

    @property
    def thermal_name(self) -> str:
        """As a person reads it: "0 NONE", or "unknown"."""
        if self.thermal_status is None:
            return "unknown"
        known = self.thermal_status < len(THERMAL_NAMES)
        return f"{self.thermal_status} {THERMAL_NAMES[self.thermal_status]}" if known else str(self.thermal_status)

    def allowed(self) -> dict[str, int]:
        """The highest frequency in MHz that each cluster is allowed, by its cores, of those that say so."""
        return {one.cores: one.allowed_mhz for one in self.clusters if one.allowed_mhz is not None}

    def throttling(self, best: "PhoneState") -> str | None:
        """Why a latency measured now does not count; None: for nothing that the phone admits.

        Args:
            best: the best that was seen of the phone, see `best_of`. What it reported then and does not report now
                is no sign of a cool phone.
        """
        if self.thermal_status:
            return f"thermal status {self.thermal_name}"
        if self.thermal_status is None and best.thermal_status is not None:
            return UNREPORTED
        now = self.allowed()
        for cores, most in best.allowed().items():
            if cores not in now:
                return f"{UNREPORTED} (the clock of cores {cores} is missing)"
            if now[cores] < most:
                return f"cores {cores} held at {now[cores]} MHz, {most} MHz before"
        return None

    def best_of(self, later: "PhoneState") -> "PhoneState":
        """This state with the highest allowed frequency of each cluster in either, and all that either reports."""
        clusters = {cluster.cores: cluster for cluster in self.clusters}
        known = self.allowed()
        for cluster in later.clusters:
            if (cluster.allowed_mhz or 0) >= known.get(cluster.cores, 0):
                clusters[cluster.cores] = cluster
        status = later.thermal_status if self.thermal_status is None else self.thermal_status
        return replace(self, thermal_status=status, clusters=tuple(clusters.values()))


def parse_properties(text: str) -> dict[str, str]:
    """The output of `getprop`; empty values are left out."""
    return {name: value for name, value in re.findall(r"^\[(.+?)\]: \[(.*)\]$", text, re.MULTILINE) if value}


def parse_state(text: str) -> PhoneState:
    """The output of the script behind `phone_state`.

    Where Android finds no thermal driver ("HAL Ready: false"), status 0 is where its variable starts: it says nothing.
    """
    thermal, _, policies = text.partition(f"{_POLICIES}\n")
    found = re.search(r"^\s*Thermal Status: (\d+)", thermal, re.MULTILINE)
    status = int(found[1]) if found else None
    if status == 0 and re.search(r"^\s*HAL Ready: false", thermal, re.MULTILINE):
        status = None
    current = thermal.partition("Current temperatures from HAL:")[2] or thermal
    return PhoneState(
        thermal_status=status,
        sensors={
            name: float(value)
            for value, name in re.findall(r"\bTemperature\{mValue=(-?[\d.]+), mType=-?\d+, mName=([^,}]+)", current)
        },
        overridden=bool(re.search(r"IsStatusOverride: true", thermal)),
        clusters=tuple(_cluster(line) for line in policies.splitlines() if line.count("|") == 3),
    )


def _cluster(line: str) -> Cluster:
    cores, governor, most, allowed = (field.strip() for field in line.split("|"))

    def megahertz(kilohertz: str) -> int | None:
        return int(kilohertz) // 1000 if kilohertz.isdecimal() else None

    return Cluster(_ranges(cores), governor or None, megahertz(most), megahertz(allowed))


def _ranges(cores: str) -> str:
    """ "0 1 2 3" as "0-3"."""
    numbers = [int(core) for core in cores.split() if core.isdecimal()]
    whole = numbers and numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 1
    return f"{numbers[0]}-{numbers[-1]}" if whole else ",".join(map(str, numbers))


def parse_battery(text: str) -> dict[str, Any] | None:
    """Level in percent, degrees Celsius, and what powers the phone, of `dumpsys battery`; None without a level."""
    fields = {name.strip(): value.strip() for name, value in re.findall(r"^\s*([\w ]+): *(.*)$", text, re.MULTILINE)}
    if not fields.get("level", "").isdecimal():
        return None
    scale = int(fields["scale"]) if fields.get("scale", "").isdecimal() else 100
    tenths = fields.get("temperature", "")
    return {
        "level": round(100 * int(fields["level"]) / (scale or 100)),
        "celsius": int(tenths) / 10 if re.fullmatch(r"-?\d+", tenths) else None,
        "charging": fields.get("status") == "2",  # android.os.BatteryManager.BATTERY_STATUS_CHARGING
        "powered_by": [name for name in ("AC", "USB", "Wireless", "Dock") if fields.get(f"{name} powered") == "true"],
    }


def parse_wakefulness(text: str) -> str | None:
    """ "Awake", "Asleep", "Dreaming" or "Dozing", of `dumpsys power`; None where it does not say."""
    found = re.search(r"^\s*mWakefulness=(\w+)", text, re.MULTILINE)
    return found[1] if found else None


def name_of(properties: Mapping[str, str]) -> str:
    """The phone's name: "Google Pixel 6"."""
    maker, model = properties.get("ro.product.manufacturer", ""), properties.get("ro.product.model", "")
    maker = maker[:1].upper() + maker[1:]
    return model if model.lower().startswith(maker.lower()) and model else f"{maker} {model}".strip() or "unknown phone"


def abis_of(properties: Mapping[str, str]) -> tuple[str, ...]:
    """The ABIs that the phone runs, best first."""
    listed = properties.get("ro.product.cpu.abilist") or properties.get("ro.product.cpu.abi", "")
    return tuple(abi.strip() for abi in listed.split(",") if abi.strip())


def _emulated(properties: Mapping[str, str]) -> str | None:
    marked = "1" in (properties.get("ro.kernel.qemu"), properties.get("ro.boot.qemu"))
    if marked or properties.get("ro.hardware") in ("ranchu", "goldfish"):
        return "Android emulator or test device: not a phone's figures"
    return None


def phone_state(adb: Adb) -> PhoneState:
    """Heat and clocks now."""
    return parse_state(adb.shell(_STATE_SCRIPT).out)


def phone_properties(adb: Adb) -> dict[str, str]:
    """Android's system properties."""
    return parse_properties(adb.shell(_ABOUT_SCRIPTS["properties"]).out)


def phone_cores(adb: Adb) -> int | None:
    """The number of cores; None where it cannot be read."""
    return _core_count(*(adb.shell(f"{_ABOUT_SCRIPTS[name]} 2>/dev/null").out.strip() for name in ("cores", "count")))


def describe_phone(adb: Adb, state: PhoneState, *, runtime: str, backend: str, taskset: str | None) -> dict[str, Any]:
    """What a reader needs to know about the phone to judge the figures (`Measurements.device`).

    Args:
        adb: the phone.
        state: its heat and clocks when measuring started.
        runtime: what runs the models.
        backend: which of its delegates.
        taskset: the cores' mask, in hexadecimal, if it is held to some.
    """
    about = {name: adb.shell(f"{script} 2>/dev/null").out.strip() for name, script in _ABOUT_SCRIPTS.items()}
    return compose(about, state, serial=adb.serial, runtime=runtime, backend=backend, taskset=taskset)


def compose(
    about: Mapping[str, str], state: PhoneState, *, serial: str, runtime: str, backend: str, taskset: str | None
) -> dict[str, Any]:
    """`describe_phone` of what the phone's commands printed."""
    properties = parse_properties(about["properties"])
    chip = [properties.get("ro.soc.manufacturer"), properties.get("ro.soc.model")]
    soc = " ".join(part for part in chip if part) or properties.get("ro.board.platform")
    abis = abis_of(properties)
    battery = parse_battery(about["battery"])
    cores = _core_count(about["cores"], about["count"])
    device: dict[str, Any] = {
        "kind": "adb",
        "name": name_of(properties),
        "serial": serial,
        "android": properties.get("ro.build.version.release"),
        "sdk": _number(properties.get("ro.build.version.sdk")),
        "fingerprint": properties.get("ro.build.fingerprint"),
        "soc": soc,
        "abi": abis[0] if abis else None,
        "abis": list(abis),
        "cores": cores,
        "clusters": [asdict(cluster) for cluster in state.clusters],
        "governor": _governors(state.clusters),
        "wakefulness": parse_wakefulness(about["power"]),
        "battery": battery,
        "low_power": {"0": False, "1": True}.get(about["low_power"]),
        "thermal": {"status": state.thermal_status, "name": state.thermal_name, "sensors": dict(state.sensors)},
        "backend": backend,
        "gpu_precision": _GPU_PRECISION if backend == "GPU" else None,
        "taskset": taskset,
        "runtime": runtime,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if emulated := _emulated(properties):
        device["emulated"] = emulated
    device["headline"] = _headline(device)
    return device


def with_unknown_precision(device: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a phone whose benchmark_model does not know the flag for the GPU's precision."""
    changed = {**device, "gpu_precision": "unknown"}
    return changed | {"headline": _headline(changed)}


def _headline(device: Mapping[str, Any]) -> list[str]:
    precision = {None: "", "unknown": ", precision unknown"}.get(
        device["gpu_precision"], f", {device['gpu_precision']}"
    )
    return [
        f"{device['name']} ({device['serial']}), Android {device['android'] or 'unknown'} "
        f"(SDK {device['sdk'] or 'unknown'}), {device['soc'] or 'unknown chip'}, {device['abi'] or 'unknown ABI'}, "
        f"{device['cores'] or 'unknown number of'} cores",
        f"{device['runtime']}, {device['backend']}{precision}, governor {device['governor']}, "
        f"{_battery(device['battery'])}, {(device['wakefulness'] or 'wakefulness unknown').lower()}, thermal status "
        f"{device['thermal']['name']}{f', taskset {taskset}' if (taskset := device['taskset']) else ''}, "
        f"{device['date']}",
    ]


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def _core_count(present: str, count: str) -> int | None:
    """Of "0-7", the kernel's list of cores; else of `nproc`."""
    ranges = re.findall(r"(\d+)(?:-(\d+))?", present)
    return sum(int(last or first) - int(first) + 1 for first, last in ranges) or _number(count)


def _governors(clusters: Sequence[Cluster]) -> str:
    return ", ".join(f"{one.governor or 'unknown'} (cores {one.cores})" for one in clusters) or "unknown"


def _battery(battery: Mapping[str, Any] | None) -> str:
    if battery is None:
        return "battery unknown"
    heat = "" if battery["celsius"] is None else f" {battery['celsius']:g} °C"
    return f"battery {battery['level']} %{heat}{' charging' if battery['charging'] else ''}"


def doubts(device: Mapping[str, Any], state: PhoneState) -> list[str]:
    """What about a phone makes its figures doubtful from the start."""
    found = []
    if state.thermal_status is None and not state.allowed():
        found.append(
            "The phone reports neither a thermal status nor the clocks that its cores are allowed: throttling cannot "
            "be seen."
        )
    elif state.thermal_status is None:
        found.append(
            "The phone reports no thermal status (Android 10 and newer with a thermal driver do): throttling may go "
            "unnoticed."
        )
    if state.overridden:
        found.append("The phone's thermal status is set by hand (cmd thermalservice): it says nothing about heat.")
    if device["wakefulness"] not in (None, "Awake"):
        found.append(
            f"The phone is not awake (Android calls it {device['wakefulness']}), and may run slower for that: switch "
            "the screen on, and Stay awake in the Developer options."
        )
    if device["low_power"]:
        found.append("The phone saves power: battery saver is on.")
    battery = device["battery"]
    if battery and battery["level"] < 20:
        found.append(f"The phone's battery is at {battery['level']} %: phones slow down when it is low.")
    for cluster in state.clusters:
        if cluster.max_mhz and cluster.allowed_mhz and cluster.allowed_mhz < cluster.max_mhz:
            found.append(f"Cores {cluster.cores} are held at {cluster.allowed_mhz} of {cluster.max_mhz} MHz.")
    return found
