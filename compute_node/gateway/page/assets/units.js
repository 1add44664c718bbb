// Numbers with their units, in English.
const formats = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const UNITS = ["bytes", "KiB", "MiB", "GiB"];

export const number = (value) => formats.format(value ?? 0);

export function bytes(value) {
  let place = 0;
  for (; value >= 1024 && place < UNITS.length - 1; place += 1) value /= 1024;
  return `${place ? value.toFixed(1) : number(value)} ${UNITS[place]}`;
}

export function duration(seconds) {
  if (seconds >= 1) return `${seconds.toFixed(1)} s`;
  return seconds < 0.001 ? `${(1000 * seconds).toFixed(2)} ms` : `${(1000 * seconds).toFixed(0)} ms`;
}

export const percent = (share, digits = 1) => (share === null || share === undefined ? "–" : `${(100 * share).toFixed(digits)} %`);
