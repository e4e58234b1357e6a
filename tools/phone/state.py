"""What the emulated phone's fixtures for Android's commands say: files that tests change while the phone runs.

The formats are those of Android 12 to 14 (BatteryService, ThermalManagerService and PowerManagerService.dumpInternal,
and dumpsys's own line about a service that does not answer); the values are made up.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CORES = 8
CLUSTERS = {0: 1803000, 4: 2802000}  # the first core of each, its highest frequency in kHz
PROPERTIES = {
    "ro.product.manufacturer": "Emulator",
    "ro.product.brand": "emulator",
    "ro.product.model": "Emulated phone",
    "ro.product.device": "emulated",
    "ro.product.name": "emulated",
    "ro.build.version.release": "14",
    "ro.build.version.sdk": "34",
    "ro.build.fingerprint": "emulator/emulated/emulated:14/TEST.FIXTURE/1:userdebug/test-keys",
    "ro.soc.manufacturer": "QEMU",
    "ro.soc.model": "user emulation",
    "ro.board.platform": "qemu",
    "ro.hardware": "qemu",
    "ro.kernel.qemu": "1",
}
_CORTEX_A76 = """processor	: {core}
BogoMIPS	: 100.00
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x4
CPU part	: 0xd0b
CPU revision	: 1

"""


@dataclass(frozen=True)
class Battery:
    """Fields of `dumpsys battery`."""

    level: int = 85
    temperature_tenths: int = 281
    usb_powered: bool = True
    status: int = 2  # 1 unknown, 2 charging, 3 discharging, 4 not charging, 5 full (BatteryManager)

    def dump(self) -> str:
        """As Android prints it."""
        return f"""Current Battery Service state:
  AC powered: false
  USB powered: {str(self.usb_powered).lower()}
  Wireless powered: false
  Dock powered: false
  Max charging current: 500000
  Max charging voltage: 5000000
  Charge counter: 3915000
  status: {self.status}
  health: 2
  present: true
  level: {self.level}
  scale: 100
  voltage: 4274
  temperature: {self.temperature_tenths}
  technology: Li-ion
"""


def thermal_dump(status: int, has_driver: bool = True) -> str:
    """`dumpsys thermalservice` at this status; the cached temperatures are older, as on real phones.

    Without a thermal driver (HAL) Android knows no temperature.
    """
    skin = 31.5 + 4 * status
    listeners = f"""IsStatusOverride: false
ThermalEventListeners:
	callbacks: 2
	killed: false
	broadcasts count: -1
ThermalStatusListeners:
	callbacks: 4
	killed: false
	broadcasts count: -1
Thermal Status: {status}
Cached temperatures:
"""
    if not has_driver:
        return f"{listeners}HAL Ready: false\n"
    return f"""{listeners}\
	Temperature{{mValue=65.0, mType=0, mName=BIG, mStatus=0}}
	Temperature{{mValue=30.25, mType=3, mName=VIRTUAL-SKIN, mStatus=0}}
HAL Ready: true
HAL connection:
	ThermalHAL 2.0 connected: yes
Current temperatures from HAL:
	Temperature{{mValue={skin + 14.0}, mType=0, mName=BIG, mStatus=0}}
	Temperature{{mValue={skin}, mType=3, mName=VIRTUAL-SKIN, mStatus={status}}}
	Temperature{{mValue=28.1, mType=2, mName=battery, mStatus=0}}
Current cooling devices from HAL:
	CoolingDevice{{mValue={status}, mType=2, mName=thermal-cpufreq-0}}
Temperature static thresholds from HAL:
	TemperatureThreshold{{mType=3, mName=VIRTUAL-SKIN, mHotThrottlingThresholds=[NaN, 39.0, 43.0, 45.0, 46.5, 52.0, \
55.0], mColdThrottlingThresholds=[NaN, NaN, NaN, NaN, NaN, NaN, NaN]}}
"""


def power_dump(wakefulness: str) -> str:
    """The beginning of `dumpsys power`: Awake, Asleep, Dreaming or Dozing."""
    return f"""POWER MANAGER (dumpsys power)

Power Manager State:
  Settings power_manager_constants:
    no_cached_wake_locks=true
  mDirty=0x0
  mWakefulness={wakefulness}
  mWakefulnessChanging=false
  mIsPowered=true
  mPlugType=2
"""


def abi_properties(abi: str) -> dict[str, str]:
    """What `getprop` says of the ABI; an x86_64 phone here runs no ARM code."""
    return {"ro.product.cpu.abi": abi, "ro.product.cpu.abilist": abi}


def write_properties(directory: Path, properties: Mapping[str, str]) -> None:
    """What `getprop` says."""
    _replace(directory / "properties", "".join(f"[{name}]: [{value}]\n" for name, value in sorted(properties.items())))


def write_battery(directory: Path, battery: Battery) -> None:
    """What `dumpsys battery` says."""
    _replace(directory / "dumpsys.battery", battery.dump())


def write_thermal(directory: Path, status: int | None, has_driver: bool = True) -> None:
    """What `dumpsys thermalservice` says; None: the service does not answer."""
    timeout = "\n*** SERVICE 'thermalservice' DUMP TIMEOUT (10000ms) EXPIRED ***\n\n"
    _replace(directory / "dumpsys.thermalservice", timeout if status is None else thermal_dump(status, has_driver))


def write_wakefulness(directory: Path, wakefulness: str | None) -> None:
    """What `dumpsys power` says; None: there is no such service."""
    if wakefulness is None:
        (directory / "dumpsys.power").unlink(missing_ok=True)
    else:
        _replace(directory / "dumpsys.power", power_dump(wakefulness))


def write_all(directory: Path, properties: Mapping[str, str]) -> None:
    """A cool phone with its screen on, a charged battery, eight cores and the governor schedutil."""
    write_properties(directory, properties)
    write_battery(directory, Battery())
    write_thermal(directory, 0)
    write_wakefulness(directory, "Awake")
    _replace(directory / "settings.global.low_power", "0\n")
    _replace(directory / "cpuinfo", "".join(_CORTEX_A76.format(core=core) for core in range(CORES)))
    processors = directory / "sys/devices/system/cpu"
    processors.mkdir(parents=True)
    for name in ("possible", "present", "online"):
        (processors / name).write_text(f"0-{CORES - 1}\n")
    (processors / "kernel_max").write_text(f"{CORES - 1}\n")
    for first, highest in CLUSTERS.items():
        policy = processors / f"cpufreq/policy{first}"
        policy.mkdir(parents=True)
        cores = range(first, first + CORES // len(CLUSTERS))
        for name in ("related_cpus", "affected_cpus"):
            (policy / name).write_text(" ".join(map(str, cores)) + "\n")
        (policy / "scaling_governor").write_text("schedutil\n")
        for name in ("scaling_max_freq", "cpuinfo_max_freq"):
            (policy / name).write_text(f"{highest}\n")
        for name in ("scaling_min_freq", "cpuinfo_min_freq", "scaling_cur_freq"):
            (policy / name).write_text("300000\n")
        for core in cores:
            (processors / f"cpu{core}").mkdir()
            (processors / f"cpu{core}/cpufreq").symlink_to(f"../cpufreq/policy{first}")


def write_allowed(directory: Path, policy: int, kilohertz: int) -> None:
    """The highest frequency that the phone allows the cores of a policy at present."""
    _replace(directory / f"sys/devices/system/cpu/cpufreq/policy{policy}/scaling_max_freq", f"{kilohertz}\n")


def remove_policy(directory: Path, policy: int) -> None:
    """Takes a policy away, as Linux does while all its cores are switched off."""
    (directory / f"sys/devices/system/cpu/cpufreq/policy{policy}").rename(directory / f"policy{policy}.removed")


def _replace(path: Path, text: str) -> None:
    """Writes the file so that a reader on the phone sees it whole, before or after."""
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    os.replace(temporary, path)
