// The pages of textenv feedback: joining, ranking by keys, buttons and drag, drafts, and the live dashboard.
"use strict";

const find = (selector, root = document) => root.querySelector(selector);
const findAll = (selector, root = document) => [...root.querySelectorAll(selector)];

function tell(text) {
  find("#message").textContent = text;
}

async function send(method, path, body, options = {}) {
  let response;
  try {
    response = await fetch(path, {
      method,
      headers: { "Content-Type": "application/json", "X-CSRF-Token": find("meta[name=csrf]").content },
      body: JSON.stringify(body),
      ...options,
    });
  } catch {
    throw new Error("The server does not answer. Your work is still on this page: try again.");
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error || `The server answered ${response.status}. Try again.`);
  return answer;
}

function act(work) {
  return async (event) => {
    if (event) event.preventDefault();
    tell("");
    try {
      await work(event);
    } catch (error) {
      tell(error.message);
    }
  };
}

let undoing = false; // until the next page is there: a second press would take back one more
const undo = act(async () => {
  if (undoing) return;
  undoing = true;
  try {
    const { item } = await send("POST", "/api/undo", {});
    location.assign(`/items/${item}`);
  } catch (error) {
    undoing = false;
    throw error;
  }
});

if (find("#join")) {
  find("#join").addEventListener("submit", act(async () => {
    await send("POST", "/api/join", { name: find("#name").value });
    location.assign("/");
  }));
}
if (find("#undo")) find("#undo").addEventListener("click", undo);
if (find("#figures")) watchFigures(find("#figures"));
if (find("#item")) rankItem(find("#item"));

function watchFigures(place) {
  const refresh = async () => {
    if (document.hidden) return;
    const response = await fetch("/dashboard/figures");
    if (!response.ok) return tell("The figures are not up to date: the server does not answer.");
    const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
    place.replaceChildren(...fresh.body.childNodes); // the server escapes every text
    tell("");
  };
  setInterval(() => refresh().catch(() => tell("The figures are not up to date: the server does not answer.")),
    1000 * Number(place.dataset.every));
}

function rankItem(main) {
  const item = JSON.parse(main.dataset.item);
  const arena = main.classList.contains("arena");
  const list = find("#cards");
  const cards = findAll(".card").sort((a, b) => a.dataset.number - b.dataset.number);
  const draft = item.draft;
  const state = {
    ranks: cards.map((_, i) => (draft.ranks || [])[i] || null), // 1 is best; equals share a rank
    flags: { ...draft.flags },
    scores: structuredClone(draft.scores || {}),
    comment: draft.comment || "",
  };
  let visible = 0; // milliseconds that the page was on the screen before `since`
  let since = document.hidden ? null : Date.now();
  const seconds = () => (visible + (since === null ? 0 : Date.now() - since)) / 1000;
  let lastInput = Date.now();
  let timer = null;

  // Ranks.

  function groups() {
    const used = [...new Set(state.ranks.filter(Boolean))].sort((a, b) => a - b);
    return used.map((rank) => cards.map((_, i) => i).filter((i) => state.ranks[i] === rank));
  }

  const complete = () => state.ranks.every(Boolean);

  function setRank(number, rank) {
    state.ranks[number] = state.ranks[number] === rank ? null : rank;
    changed();
    if (state.ranks[number]) {
      const next = [...list.children].find((card) => !state.ranks[card.dataset.number]);
      (next || cards[number]).focus();
    }
  }

  function show() {
    const order = groups();
    cards.forEach((card, i) => {
      const place = order.findIndex((group) => group.includes(i));
      const tied = place >= 0 && order[place].length > 1;
      // Once all are ranked, gaps close: 1, 2, 2, 5 is 1st, tied 2nd, tied 2nd, 4th.
      const rank = complete() ? order.slice(0, place).flat().length + 1 : state.ranks[i];
      if (!arena) find(".rank", card).textContent = rank ? `${tied ? "tied " : ""}${ordinal(rank)}` : "";
      findAll("[data-rank]", card).forEach((button) =>
        button.setAttribute("aria-pressed", String(state.ranks[i] === Number(button.dataset.rank))));
      findAll("[data-flag]", card).forEach((button) =>
        button.setAttribute("aria-pressed", String(state.flags[i] === button.dataset.flag)));
      findAll("[data-scale]", card).forEach((select) => {
        select.value = (state.scores[i] || {})[select.dataset.scale] || "";
      });
    });
    if (find("#submit")) find("#submit").disabled = !complete();
  }

  // Drafts: saved half a second after a change, and now and then to keep the item.

  function changed() {
    lastInput = Date.now();
    changes++;
    show();
    find("#saved").textContent = "";
    clearTimeout(timer);
    timer = setTimeout(save, 500);
  }

  let changes = 0; // so that a draft of an earlier state is not called saved
  let saving = Promise.resolve(); // an answer waits for drafts on their way, which would else come after it and stay

  function save(options = {}) {
    clearTimeout(timer);
    timer = null;
    const saved = changes;
    const own = send("PUT", `/api/items/${item.id}/draft`, state, options).then(
      () => saved === changes && (find("#saved").textContent = "draft saved"),
      (error) => tell(error.message),
    );
    saving = Promise.all([saving, own]);
  }

  document.addEventListener("visibilitychange", () => {
    if (since !== null) visible += Date.now() - since;
    since = document.hidden ? null : Date.now();
  });
  setInterval(() => {
    if (!document.hidden && Date.now() - lastInput < 300_000) save();
  }, 1000 * item.renew);
  addEventListener("pagehide", () => timer && save({ keepalive: true }));
  addEventListener("scroll", () => (lastInput = Date.now()), { passive: true });

  // Answers.

  // An answer sent again keeps its name, so that it counts once; one that says something else gets another.
  let sent = { text: "", request: "" };
  function named(fields) {
    const text = JSON.stringify(fields);
    if (text !== sent.text) {
      const bytes = [...crypto.getRandomValues(new Uint8Array(16))];
      sent = { text, request: bytes.map((byte) => byte.toString(16).padStart(2, "0")).join("") };
    }
    return { ...fields, request: sent.request, seconds: seconds() };
  }

  let sending = false;
  const answer = (fields) => act(async () => {
    if (sending) return;
    sending = true;
    clearTimeout(timer);
    timer = null;
    try {
      await saving;
      const { ranks, ...rest } = state;
      await send("POST", `/api/items/${item.id}`, named({ ranking: groups(), ...rest, ...fields() }));
      location.assign(item.answered ? "/answered" : "/");
    } finally {
      sending = false;
    }
  });
  const submit = answer(() => ({ action: "rank" }));
  const skip = answer(() => ({ action: "skip", ranking: [], flags: {}, scores: {} }));
  const choices = { first: [[0], [1]], tie: [[0, 1]], second: [[1], [0]] };
  const choose = (name) => answer(() => ({ action: "rank", ranking: choices[name] }))();

  // Buttons.

  function toggleFlag(number, flag) {
    if (state.flags[number] === flag) delete state.flags[number];
    else state.flags[number] = flag;
    changed();
  }

  cards.forEach((card, i) => {
    findAll("[data-rank]", card).forEach((button) =>
      button.addEventListener("click", () => setRank(i, Number(button.dataset.rank))));
    findAll("[data-flag]", card).forEach((button) =>
      button.addEventListener("click", () => toggleFlag(i, button.dataset.flag)));
    findAll("[data-scale]", card).forEach((select) =>
      select.addEventListener("change", () => {
        const own = (state.scores[i] ||= {});
        if (select.value) own[select.dataset.scale] = Number(select.value);
        else delete own[select.dataset.scale];
        changed();
      }));
    if (find(".handle", card)) find(".handle", card).addEventListener("pointerdown", (event) => drag(card, event));
  });
  findAll("[data-choice]").forEach((button) => button.addEventListener("click", () => choose(button.dataset.choice)));
  if (find("#submit")) find("#submit").addEventListener("click", submit);
  find("#skip").addEventListener("click", skip);
  find("#comment").value = state.comment;
  find("#comment").addEventListener("input", (event) => {
    state.comment = event.target.value;
    changed();
  });

  // Drag: between two responses ranks in between, on the middle of one ties with it.

  function drag(card, event) {
    if (event.button) return;
    event.preventDefault();
    const handle = event.target;
    const order = groups();
    order.push(...cards.map((_, i) => i).filter((i) => !state.ranks[i]).map((i) => [i]));
    list.append(...order.flat().map((i) => cards[i])); // the list shows the ranking from now on
    handle.setPointerCapture(event.pointerId);
    card.classList.add("dragged");
    let target = null;
    let side = "";
    const clear = () => cards.forEach((other) => other.classList.remove("before", "after", "tie"));
    const move = (at) => {
      clear();
      const under = document.elementFromPoint(at.clientX, at.clientY);
      target = under && under.closest(".card");
      if (!target || target === card) return (target = null);
      const { top, height } = target.getBoundingClientRect();
      const part = (at.clientY - top) / height;
      side = part < 0.3 ? "before" : part > 0.7 ? "after" : "tie";
      target.classList.add(side);
    };
    const drop = () => {
      handle.removeEventListener("pointermove", move);
      handle.removeEventListener("pointerup", drop);
      handle.removeEventListener("pointercancel", drop);
      clear();
      card.classList.remove("dragged");
      if (target) {
        const own = Number(card.dataset.number);
        const ranking = order.map((group) => group.filter((i) => i !== own)).filter((group) => group.length);
        const place = ranking.findIndex((group) => group.includes(Number(target.dataset.number)));
        if (side === "tie") ranking[place].push(own);
        else ranking.splice(place + (side === "after"), 0, [own]);
        ranking.forEach((group, rank) => group.forEach((i) => (state.ranks[i] = rank + 1)));
        list.append(...ranking.flat().map((i) => cards[i]));
        card.focus();
        changed();
      }
    };
    handle.addEventListener("pointermove", move);
    handle.addEventListener("pointerup", drop);
    handle.addEventListener("pointercancel", drop);
  }

  // Keys.

  const keys = find("#keys");
  const stored = (work) => {
    try {
      return work();
    } catch {
      return null; // the browser keeps nothing: single keys work on each page anew
    }
  };
  keys.checked = stored(() => localStorage.getItem("keys")) !== "off";
  keys.addEventListener("change", () => stored(() => localStorage.setItem("keys", keys.checked ? "on" : "off")));

  function moveFocus(step) {
    const shown = [...list.children];
    const at = shown.indexOf(document.activeElement.closest(".card"));
    shown[at < 0 ? 0 : (at + step + shown.length) % shown.length].focus();
  }

  document.addEventListener("keydown", (event) => {
    const on = event.target;
    lastInput = Date.now();
    if (event.key === "Escape" && on.id === "comment") return on.blur();
    if (event.ctrlKey || event.metaKey || event.altKey || !keys.checked || on.matches("textarea, select, input")) return;
    const focused = on.closest && on.closest(".card");
    const card = focused || [...list.children].find((own) => !state.ranks[own.dataset.number]) || list.children[0];
    const number = Number(card.dataset.number);
    const key = event.key.toLowerCase();
    const commands = {
      arrowdown: () => moveFocus(1),
      arrowup: () => moveFocus(-1),
      h: () => toggleFlag(number, "harmful"),
      n: () => toggleFlag(number, "nonsense"),
      c: () => find("#comment").focus(),
      s: () => skip(),
      u: () => undo(),
    };
    if (arena) Object.assign(commands, {
      arrowleft: () => choose("first"), arrowright: () => choose("second"), t: () => choose("tie"),
    });
    else {
      commands[0] = commands.backspace = () => {
        state.ranks[number] = null;
        changed();
      };
      for (let rank = 1; rank <= Math.min(cards.length, 9); rank++) commands[rank] = () => setRank(number, rank);
      if (!on.matches("button, a, summary")) commands.enter = () => complete() && submit();
    }
    if (commands[key]) {
      event.preventDefault();
      if (event.repeat && !["arrowdown", "arrowup"].includes(key)) return; // held down, perhaps since the last page
      commands[key]();
    }
  });

  show();
  if (!arena) list.children[0].focus();
}

function ordinal(number) {
  const endings = { 1: "st", 2: "nd", 3: "rd" };
  return number + ((number % 100 > 10 && number % 100 < 14) ? "th" : endings[number % 10] || "th");
}
