#include "program.hpp"

#include <map>
#include <stdexcept>

namespace ptxvm {

namespace {

using Words = std::vector<std::string>;

struct Form {
  std::vector<Words> groups;  // an empty word in a group: it may be missing
  int operands, optional;
  Handler run;
  Class kind;
};

Class current_kind;

std::multimap<std::string, Form>& forms() {
  static std::multimap<std::string, Form> table;
  return table;
}

Words split(const std::string& text, char separator) {
  Words words;
  size_t start = 0;
  for (size_t end; (end = text.find(separator, start)) != std::string::npos; start = end + 1)
    words.push_back(text.substr(start, end - start));
  words.push_back(text.substr(start));
  return words;
}

bool matches(const Words& words, size_t word, const std::vector<Words>& groups, size_t group) {
  if (group == groups.size()) return word == words.size();
  for (const std::string& choice : groups[group])
    if (choice.empty() ? matches(words, word, groups, group + 1)
                       : word < words.size() && words[word] == choice && matches(words, word + 1, groups, group + 1))
      return true;
  return false;
}

void read_modifiers(Inst& inst, const Words& words) {
  static const std::map<std::string, void (*)(Inst&)> meaning = {
      {"rn", [](Inst& i) { i.rounding = Rounding::nearest; }},  {"rni", [](Inst& i) { i.integral = true, i.rounding = Rounding::nearest; }},
      {"rz", [](Inst& i) { i.rounding = Rounding::zero; }},     {"rzi", [](Inst& i) { i.integral = true, i.rounding = Rounding::zero; }},
      {"rm", [](Inst& i) { i.rounding = Rounding::down; }},     {"rmi", [](Inst& i) { i.integral = true, i.rounding = Rounding::down; }},
      {"rp", [](Inst& i) { i.rounding = Rounding::up; }},       {"rpi", [](Inst& i) { i.integral = true, i.rounding = Rounding::up; }},
      {"rna", [](Inst& i) { i.rounding = Rounding::away; }},    {"ftz", [](Inst& i) { i.ftz = true; }},
      {"sat", [](Inst& i) { i.sat = true; }},                   
      {"relu", [](Inst& i) { i.relu = true; }},
      {"wrap", [](Inst& i) { i.wrap = true; }},                 {"trans", [](Inst& i) { i.transposed = true; }},
      {"x2", [](Inst& i) { i.vec = 2; }},                       {"x4", [](Inst& i) { i.vec = 4; }},
      {"nc", [](Inst& i) { i.constant = true; }},               {"aligned", [](Inst& i) { i.aligned = true; }},
      {"v2", [](Inst& i) { i.vec = 2; }},                       {"v4", [](Inst& i) { i.vec = 4; }},
      {"v8", [](Inst& i) { i.vec = 8; }},                       {"global", [](Inst& i) { i.space = Space::global; }},
      {"const", [](Inst& i) { i.space = Space::global; }},      {"shared", [](Inst& i) { i.space = Space::shared; }},
      {"shared::cta", [](Inst& i) { i.space = Space::shared; }},
      {"shared::cluster", [](Inst& i) { i.space = Space::shared; }},
      {"local", [](Inst& i) { i.space = Space::local; }},       {"param", [](Inst& i) { i.space = Space::param; }},
      {"relaxed", [](Inst& i) { i.scope = Scope::grid; }},      {"volatile", [](Inst& i) { i.scope = Scope::grid; }},
      {"acquire", [](Inst& i) { i.scope = Scope::grid, i.acquires = true; }},
      {"release", [](Inst& i) { i.scope = Scope::grid, i.releases = true; }},
      {"acq_rel", [](Inst& i) { i.scope = Scope::grid, i.acquires = i.releases = true; }},
      {"cta", [](Inst& i) { i.scope = Scope::block; }},         {"cluster", [](Inst& i) { i.scope = Scope::cluster; }},
      {"gpu", [](Inst& i) { i.scope = Scope::grid; }},          {"gl", [](Inst& i) { i.scope = Scope::grid; }},
      {"sys", [](Inst& i) { i.scope = Scope::grid; }},
      {"eq", [](Inst& i) { i.accepts = equal; }},               {"ne", [](Inst& i) { i.accepts = less | greater; }},
      {"lt", [](Inst& i) { i.accepts = less; }},                {"le", [](Inst& i) { i.accepts = less | equal; }},
      {"gt", [](Inst& i) { i.accepts = greater; }},             {"ge", [](Inst& i) { i.accepts = greater | equal; }},
      {"lo", [](Inst& i) { i.accepts = less; }},                {"ls", [](Inst& i) { i.accepts = less | equal; }},
      {"hi", [](Inst& i) { i.accepts = greater; }},             {"hs", [](Inst& i) { i.accepts = greater | equal; }},
      {"equ", [](Inst& i) { i.accepts = equal | unordered; }},
      {"neu", [](Inst& i) { i.accepts = less | greater | unordered; }},
      {"ltu", [](Inst& i) { i.accepts = less | unordered; }},
      {"leu", [](Inst& i) { i.accepts = less | equal | unordered; }},
      {"gtu", [](Inst& i) { i.accepts = greater | unordered; }},
      {"geu", [](Inst& i) { i.accepts = greater | equal | unordered; }},
      {"num", [](Inst& i) { i.accepts = less | equal | greater; }},
      {"nan", [](Inst& i) { i.accepts = unordered; }},
      {"and", [](Inst& i) { i.function = 1; }},                 {"or", [](Inst& i) { i.function = 2; }},
      {"xor", [](Inst& i) { i.function = 3; }},
  };
  for (const std::string& word : words)
    if (const auto found = meaning.find(word); found != meaning.end()) found->second(inst);
}

}  // namespace

void section(Class kind) { current_kind = kind; }

void on(const std::string& pattern, int operands, Handler run, int optional) {
  Words tokens = split(pattern, ' ');
  Form form{{}, operands, optional, run, current_kind};
  for (size_t k = 1; k < tokens.size(); ++k) {
    const bool may_miss = tokens[k].back() == '?';
    if (may_miss) tokens[k].pop_back();
    form.groups.push_back(split(tokens[k], '|'));
    if (may_miss) form.groups.back().push_back("");
  }
  forms().emplace(tokens[0], form);
}

Inst decode(const std::string& opcode, int operands) {
  Words words = split(opcode, '.');
  const std::string name = words[0];
  words.erase(words.begin());
  const auto [first, last] = forms().equal_range(name);
  if (first == last) throw std::invalid_argument("unknown instruction '" + name + "'");
  std::string counts;
  for (auto it = first; it != last; ++it) {
    const Form& form = it->second;
    if (!matches(words, 0, form.groups, 0)) continue;
    Inst inst{form.run, form.kind};
    read_modifiers(inst, words);
    if ((name == "atom" || name == "red") && inst.scope == Scope::weak) inst.scope = Scope::grid;
    inst.operands = u8(operands);
    const int least = form.operands + inst.vec - 1;
    if (operands >= least && operands <= least + form.optional) return inst;
    counts += (counts.empty() ? "" : " or ") + std::to_string(least);
  }
  if (counts.empty()) throw std::invalid_argument("'" + name + "' is known, but not with these modifiers and types");
  throw std::invalid_argument("'" + opcode + "' takes " + counts + " operands, not " + std::to_string(operands));
}

}  // namespace ptxvm
