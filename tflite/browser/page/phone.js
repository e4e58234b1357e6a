// What the browser tells of itself and its phone.

const BROWSERS = [
  ["Edge", /\bEdg(?:A|iOS)?\/([\d.]+)/],
  ["Samsung Internet", /\bSamsungBrowser\/([\d.]+)/],
  ["Chrome on iOS", /\bCriOS\/([\d.]+)/],
  ["Firefox on iOS", /\bFxiOS\/([\d.]+)/],
  ["Firefox", /\bFirefox\/([\d.]+)/],
  ["headless Chrome", /\bHeadlessChrome\/([\d.]+)/],
  ["Chrome", /\bChrome\/([\d.]+)/],
  ["Safari", /\bVersion\/([\d.]+).*Safari/],
];
// User agents no longer tell the version of most systems: macOS stays at 10.15.7 and Windows at NT 10.0, Chrome writes
// "Android 10; K" on every phone, and Safari 26 or newer writes iOS 18.6 or 18.7 for every iOS. Those are left out.
const SYSTEMS = [
  [/\b(?:iPhone|iPad|iPod)\b.* OS ([\d_]+)/, (match) => (isFrozenIos(match) ? "iOS" : `iOS ${dotted(match[1])}`)],
  [/\bAndroid 10; K\)/, () => "Android"],
  [/\bAndroid ([\d.]+)/, (match) => `Android ${match[1]}`],
  [/\bMac OS X\b/, () => (navigator.maxTouchPoints > 1 ? "iPadOS" : "macOS")],
  [/\bWindows NT\b/, () => "Windows"],
  [/\bCrOS\b/, () => "ChromeOS"],
  [/\bLinux\b/, () => "Linux"],
];
const FIRST_SAFARI_WITHOUT = 26;

// A function of 13 bytes that needs relaxed SIMD (i8x16.relaxed_swizzle).
const RELAXED_SIMD = new Uint8Array([
  ...[0x00, 0x61, 0x73, 0x6d, 0x01, 0x00, 0x00, 0x00], // "\0asm", version 1
  ...[0x01, 0x05, 0x01, 0x60, 0x00, 0x01, 0x7b], // types: () -> v128
  ...[0x03, 0x02, 0x01, 0x00], // functions: one of that type
  ...[0x0a, 0x0f, 0x01, 0x0d, 0x00, 0x41, 0x00, 0xfd, 0x0f, 0x41, 0x00, 0xfd, 0x0f, 0xfd, 0x80, 0x02, 0x0b],
]);

// -> {name, user_agent, browser, os, model, logical_cores, memory_gib, cross_origin_isolated, relaxed_simd, secure_context}
export async function describePhone() {
  const agent = navigator.userAgent;
  const told = await toldByAgentData();
  const os = told.os || parsed(agent);
  const model = told.model || modelOf(agent);
  const device = /\b(iPhone|iPad|iPod)\b/.exec(agent);
  return {
    name: printable(model || (device && device[1]) || (os === "iPadOS" ? "iPad" : os), 80),
    user_agent: printable(agent, 300),
    browser: printable(browserOf(agent), 80),
    os: printable(os, 80),
    model: model ? printable(model, 80) : null,
    logical_cores: navigator.hardwareConcurrency || null,
    memory_gib: navigator.deviceMemory || null,
    cross_origin_isolated: Boolean(self.crossOriginIsolated),
    relaxed_simd: WebAssembly.validate(RELAXED_SIMD),
    secure_context: Boolean(self.isSecureContext),
  };
}

// Chrome on Android knows the model, but hides it and the version from the user agent; Safari has no such interface.
async function toldByAgentData() {
  if (!navigator.userAgentData || !navigator.userAgentData.getHighEntropyValues) return {};
  try {
    const { model, platform, platformVersion } = await navigator.userAgentData.getHighEntropyValues([
      "model",
      "platformVersion",
    ]);
    return { model, os: platform ? systemOf(platform, platformVersion || "") : "" };
  } catch {
    return {};
  }
}

// For Windows the interface counts in versions of its own: 1 to 10 are Windows 10, 13 and more are Windows 11.
function systemOf(platform, version) {
  if (platform !== "Windows") return `${platform} ${version}`.trim();
  const major = parseInt(version, 10) || 0;
  return major >= 13 ? "Windows 11" : major >= 1 ? "Windows 10" : "Windows";
}

// Browsers other than Safari name no version of Safari on iOS.
function isFrozenIos({ input, 1: version }) {
  const safari = /\bVersion\/(\d+)/.exec(input);
  return safari ? Number(safari[1]) >= FIRST_SAFARI_WITHOUT : /^18_[67]/.test(version);
}

function dotted(version) {
  return version.replace(/_/g, ".");
}

function browserOf(agent) {
  for (const [name, pattern] of BROWSERS) {
    const match = pattern.exec(agent);
    if (match) return `${name} ${match[1]}`;
  }
  return "unknown browser";
}

function parsed(agent) {
  for (const [pattern, name] of SYSTEMS) {
    const match = pattern.exec(agent);
    if (match) return name(match);
  }
  return "unknown system";
}

// "Android 10; K" is what Chrome writes for every phone.
function modelOf(agent) {
  const match = /\bAndroid [\d.]+; (?:[a-z]{2}-[a-z]{2}; )?([^;)]+?)(?: Build\/[^;)]*)?[;)]/.exec(agent);
  return match && !["K", "Mobile", "Tablet"].includes(match[1]) && !/^rv:/.test(match[1]) ? match[1] : "";
}

// A text as the computer takes it: one line without control characters, and no half of a character at the cut.
export function printable(text, longest = 300) {
  const visible = String(text).replace(/[\p{C}\p{Z}]+/gu, " ");
  return [...visible].slice(0, longest).join("").trim() || "unknown";
}
