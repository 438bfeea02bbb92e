(() => {
  const table = document.getElementById("arms"), body = table.tBodies[0], status = document.getElementById("sorted");
  const heads = Array.from(table.tHead.rows[0].cells), rows = Array.from(body.rows);
  const value = (row, column) => {
    const text = row.cells[column].dataset.sort || "";
    return text === "" || Number.isNaN(Number(text)) ? text : Number(text);
  };
  const order = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  const sort = (key, down) => {
    const column = heads.findIndex((head) => head.dataset.key === key);
    if (column < 0) return;
    const sorted = rows.slice().sort((a, b) => {
      const left = value(a, column), right = value(b, column);
      if (left === "" || right === "") return (left === "") - (right === ""); // not measured: last, whatever the direction
      return down ? order(right, left) : order(left, right);
    });
    body.append(...sorted);
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", down ? "descending" : "ascending");
    status.textContent = `Sorted by “${heads[column].textContent.trim()}”, ${down ? "descending" : "ascending"}.`;
  };
  heads.filter((head) => head.dataset.key).forEach((head) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(head.dataset.key, head.getAttribute("aria-sort") === "ascending"));
    head.append(button);
  });
  const follow = () => {
    const found = /^#sort=(-?)([a-z]+)$/.exec(location.hash);
    if (found) sort(found[2], found[1] === "-");
  };
  document.documentElement.classList.add("scripted");
  addEventListener("hashchange", follow);
  follow();
})();
