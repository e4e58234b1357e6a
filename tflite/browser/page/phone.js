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
const SYSTEMS = [
  [/\b(iPhone|iPad|iPod)\b.* OS ([\d_]+)/, (match) => `iOS ${match[2].replace(/_/g, ".")}`],
  [/\bAndroid ([\d.]+)/, (match) => `Android ${match[1]}`],
  [
    /\bMac OS X ([\d_.]+)/,
    (match) => (navigator.maxTouchPoints > 1 ? "iPadOS" : `macOS ${match[1].replace(/_/g, ".")}`),
  ],
  [/\bWindows NT ([\d.]+)/, (match) => `Windows NT ${match[1]}`],
  [/\bCrOS\b/, () => "ChromeOS"],
  [/\bLinux\b/, () => "Linux"],
];

// -> {name, user_agent, browser, os, model, logical_cores, memory_gib, cross_origin_isolated, secure_context}
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
    return { model, os: platform ? `${platform} ${platformVersion || ""}`.trim() : "" };
  } catch {
    return {};
  }
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
