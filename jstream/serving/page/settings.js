/* What the reader sets: the threshold, which holds at once, and frames a second, memory and pace, which hold from the
 * next start. Options come from what the server tells of itself. */

const byId = (id) => document.getElementById(id);
const RATES = [0.5, 1, 2, 4, 8]; // frames a second that are offered
const SHORTER = [60, 30, 15]; // turns that are offered where the server remembers more

export class Settings {
  /** Args: `changed(threshold)` hears of each change. */
  constructor(changed) {
    this.#rates(Infinity);
    const [slider, automatic] = [byId("threshold"), byId("automatic")];
    const tell = () => {
      byId("threshold_value").textContent = this.threshold === null ? "automatic" : this.threshold.toFixed(2);
      changed(this.threshold);
    };
    slider.addEventListener("input", () => {
      automatic.checked = false;
      tell();
    });
    automatic.addEventListener("change", tell);
  }

  /** How likely a response must be, or null for the protocol's own rule. */
  get threshold() {
    return byId("automatic").checked ? null : Number(byId("threshold").value);
  }

  get fps() {
    return Number(byId("fps").value);
  }

  /** A memory as the server reads it, or null for its own. */
  get memory() {
    return byId("memory").value || null;
  }

  get asPlayed() {
    return byId("pace").value === "played";
  }

  /** Fits the options to what `/v1/server` told. */
  offer(about) {
    this.#rates(about.limits?.fps ?? Infinity);
    if (!about.memory) return;
    const { policy, turns } = about.memory;
    const own = turns ? `${policy}, ${turns} turns` : policy;
    const options = [new Option(own, "")];
    if (policy === "sinks") {
      for (const n of SHORTER.filter((n) => n < turns)) options.push(new Option(`sinks, ${n} turns`, `sinks:${n}`));
    }
    const chosen = byId("memory").value;
    byId("memory").replaceChildren(...options);
    byId("memory").value = options.some((option) => option.value === chosen) ? chosen : "";
  }

  #rates(most) {
    const chosen = byId("fps").value || "1";
    const rates = RATES.filter((rate) => rate <= most);
    byId("fps").replaceChildren(...(rates.length ? rates : [most]).map((rate) => new Option(String(rate), rate)));
    byId("fps").value = chosen;
    if (!byId("fps").value) byId("fps").selectedIndex = 0;
  }
}
