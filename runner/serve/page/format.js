// Numbers for people.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

/** 123456 -> "121 KiB": three figures, units of 1024. */
export function bytes(n) {
  let unit = 0;
  let value = n;
  while (value >= 1000 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? value : figures(value)} ${UNITS[unit]}`;
}

/** Three figures: 0.842, 8.42, 84.2, 842. */
export function figures(value) {
  const size = Math.abs(value);
  if (size >= 100 || value === 0) return value.toFixed(0);
  if (size >= 10) return value.toFixed(1);
  return value.toFixed(2);
}

export function percent(share) {
  if (share > 0 && share < 0.001) return "< 0.1 %";
  if (share < 1 && share > 0.999) return "> 99.9 %";
  const value = 100 * share;
  return `${value < 10 && value !== Math.round(value) ? value.toFixed(1) : value.toFixed(0)} %`;
}

export function seconds(value) {
  return value < 1 ? `${Math.round(1000 * value)} ms` : `${figures(value)} s`;
}

export function count(n) {
  return n.toLocaleString("en-US");
}
