// Starts the pages that the server lists: the module NAME.js and the section page-NAME of each.
import { at, h, isTyping, setText } from "./dom.js";
import { read } from "./api.js";

async function start() {
  // The token of the link is in the cookie now; it need not stay in the address, the history and screenshots.
  if (location.search) history.replaceState(null, "", location.pathname + location.hash);
  const session = await read("/api/session");
  const folder = session.folder.split("/").pop() || session.folder;
  setText(at("folder"), folder);
  at("folder").title = session.folder;
  document.title = `LoopOS ${folder}`;
  const links = new Map(session.pages.map(({ name, title }) => [name, h("a", { href: `#${name}` }, title)]));
  at("pages").append(...links.values());
  const started = new Set();
  const show = async () => {
    const wished = location.hash.slice(1).split("?")[0];
    const name = links.has(wished) ? wished : session.pages[0].name;
    for (const [each, link] of links) {
      at(`page-${each}`).hidden = each !== name;
      if (each === name) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    if (!started.has(name)) {
      started.add(name);
      const page = await import(`./${name}.js`);
      await page.start(at(`page-${name}`));
    }
  };
  window.addEventListener("hashchange", show);
  await show();
}

function setTheme() {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("loopos-theme", theme);
  document.documentElement.dataset.theme = theme;
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || isTyping(event.target)) return;
  if (event.key === "?") at("keys").showModal();
  else if (event.key === "t") setTheme();
  else return;
  event.preventDefault();
}

at("theme").addEventListener("click", setTheme);
at("help").addEventListener("click", () => at("keys").showModal());
document.addEventListener("keydown", keys);
start().catch((error) => setText(at("connection"), `Error: ${error.message}`));
