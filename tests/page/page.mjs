// The page in a real browser. Run by tests/it/page_browser.rs:
//   node page.mjs URL OPERATE_TOKEN READ_TOKEN MODULES OUT
// MODULES holds playwright-core and axe-core; screenshots go to OUT. Ends with 1 and the reasons where something is wrong.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import path from "node:path";

const [url, operate, read, modules, out] = process.argv.slice(2);
const require = createRequire(path.join(modules, "node_modules", "x.js"));
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

const wrong = [];
const check = (right, what) => { if (!right) wrong.push(what); };
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-dev-shm-usage"],
});

// A window that notes every error and every request that leaves the page's own host. Some pages answer with an error on
// purpose: their paths are in `expected`.
async function window(options, expected = []) {
  const context = await browser.newContext(options);
  const page = await context.newPage();
  page.setDefaultTimeout(20_000);
  page.on("console", (message) => {
    if (message.type() !== "error") return;
    const from = message.location().url;
    if (!expected.some((part) => from.includes(part))) wrong.push(`console: ${message.text()} at ${from}`);
  });
  page.on("pageerror", (error) => wrong.push(`script: ${error.message}`));
  page.on("request", (request) => check(request.url().startsWith(url), `a request to ${request.url()}`));
  return { context, page };
}

async function accessible(page, what) {
  await page.evaluate(axe);
  const found = await page.evaluate(() => globalThis.axe.run(document, {
    runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"],
  }));
  for (const violation of found.violations) {
    wrong.push(`${what}: ${violation.id}: ${violation.help} (${violation.nodes.map((n) => n.html.slice(0, 160)).join(" | ")})`);
  }
}

async function signIn(page, token) {
  await page.goto(`${url}/login`);
  await page.fill("#token", token);
  await page.click("main button");
  await page.waitForURL(`${url}/`);
}

// Where each kind of page is, found by following the links.
async function addresses(page) {
  const found = ["/", "/rounds", "/trials", "/adapters", "/prompts", "/decisions", "/dead-letters", "/config"];
  for (const [list, prefix] of [["/rounds", "/rounds/"], ["/trials", "/trials/"], ["/adapters", "/adapters/"], ["/prompts", "/prompts/"]]) {
    await page.goto(url + list);
    const link = await page.locator(`main a[href^="${prefix}"]`).first().getAttribute("href");
    check(link, `${list} leads to none of its items`);
    found.push(link);
  }
  found.push(`${found.at(-1)}&text=yes`);
  return found;
}

const sizes = [
  ["wide-light", { viewport: { width: 1280, height: 900 }, colorScheme: "light" }],
  ["wide-dark", { viewport: { width: 1280, height: 900 }, colorScheme: "dark" }],
  ["narrow-light", { viewport: { width: 375, height: 740 }, colorScheme: "light" }],
  ["narrow-dark", { viewport: { width: 375, height: 740 }, colorScheme: "dark" }],
];
for (const [name, options] of sizes) {
  const { context, page } = await window(options);
  await signIn(page, operate);
  for (const address of [...await addresses(page), "/login"]) {
    const answer = await page.goto(url + address);
    check(answer.status() === 200, `${address}: ${answer.status()}`);
    const over = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
    check(/taod \d+\.\d+\.\d+/.test(await page.locator("footer").innerText()), `${name} ${address}: the footer does not name the version`);
    check(over <= 0, `${name} ${address}: ${over} px wider than the window`);
    await accessible(page, `${name} ${address}`);
    const file = address.replace(/\?.*text=yes/, "-text").replace(/\?.*/, "").replace(/^\/(rounds|trials|adapters|prompts)\/[^-]*.*?(-text)?$/, "$1-one$2").replaceAll("/", "") || "now";
    await page.screenshot({ path: path.join(out, `${file}-${name}.png`), fullPage: true });
  }
  await context.close();
}

// By keyboard alone: the first stop skips to the content.
{
  const { context, page } = await window({ viewport: { width: 1280, height: 900 } });
  await page.goto(url);
  await page.keyboard.press("Tab");
  check(await page.evaluate(() => document.activeElement.textContent) === "Skip to the content", "the first stop is another");
  await page.keyboard.press("Enter");
  check(await page.evaluate(() => document.activeElement.id) === "main", "the skip does not reach the content");
  await context.close();
}

// A reader uncovers texts and sees no forms; a stranger on this machine is led to the login.
{
  const { context, page } = await window({ viewport: { width: 1280, height: 900 } });
  await page.goto(`${url}/prompts`);
  await page.locator('main a[href^="/prompts/"]').first().click();
  check(page.url().includes("/login?to="), `a stranger sees ${page.url()}`);
  await signIn(page, read);
  check(await page.locator('form[action^="/actions/"]').count() === 0, "a reader has forms");
  await page.goto(`${url}/prompts`);
  await page.locator('main a[href^="/prompts/"]').first().click();
  check(await page.locator("pre").count() === 0, "texts are shown before they are asked for");
  await page.getByText("Uncover them").click();
  check(await page.locator("pre").count() > 1, "texts are not shown");
  await context.close();
}

// Each action, and what comes of it shows by itself.
{
  const { context, page } = await window({ viewport: { width: 1280, height: 900 } }, ["/actions/promote"]);
  await signIn(page, operate);
  const act = async (what, reason) => {
    await page.fill(`#reason-${what}`, reason);
    await page.click(`form[action="/actions/${what}"] button`);
    await page.waitForURL(/#actions$|\/$/);
  };
  const settled = async (what, state) => {
    const row = page.locator("table tbody tr").filter({ hasText: what }).first();
    await row.locator(".tag", { hasText: /done|failed/ }).waitFor({ timeout: 120_000 });
    const text = await row.innerText();
    check(text.includes(state), `${what} is not ${state}: ${text}`);
  };
  await act("freeze", "a test of the freeze");
  await settled("a test of the freeze", "done");
  await page.getByText("Promotions are frozen").waitFor();
  await page.goto(url);
  await act("thaw", "a test of the thaw");
  await settled("a test of the thaw", "done");
  await page.goto(url);
  check(await page.getByText("Promotions are frozen").count() === 0, "the freeze stands");

  await page.goto(`${url}/adapters`);
  const version = await page.locator('main a[href^="/adapters/"]').first().innerText();
  await page.locator('main a[href^="/adapters/"]').first().click();
  await page.fill("#why", "a test of the promotion");
  await page.fill("#approve", "taod-000000000000");
  await page.evaluate(() => document.querySelector("#approve").removeAttribute("pattern"));
  await page.click('form[action="/actions/promote"] button');
  await page.getByText("not the version").waitFor();
  await page.goBack();
  await page.fill("#why", "a test of the promotion");
  await page.fill("#approve", version);
  await page.click('form[action="/actions/promote"] button');
  await settled("a test of the promotion", "done");
  await page.locator("dd", { hasText: version }).first().waitFor();
  await page.goto(url);
  await act("rollback", "a test of the rollback");
  await settled("a test of the rollback", "done");
  await page.goto(`${url}/adapters`);
  check(await page.locator("tr", { hasText: version }).locator(".tag", { hasText: "quarantined" }).count() === 1, "not quarantined");
  await page.goto(url);
  await act("run", "a test of a round");
  await settled("a test of a round", "done");
  // Without a reload; whether it is seen under way or at its end is the machine's business.
  await page.getByText("round-00002").first().waitFor({ timeout: 60_000 });
  await page.goto(`${url}/decisions`);
  await page.getByText("without a verdict of the gate: a test of the promotion").waitFor();
  await context.close();
}

await browser.close();
if (wrong.length > 0) {
  console.error([...new Set(wrong)].join("\n"));
  process.exit(1);
}
