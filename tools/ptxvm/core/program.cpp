#include "program.hpp"

#include <map>
#include <sstream>
#include <stdexcept>

namespace {

using Words = std::vector<std::string>;

struct Form {
  std::vector<Words> groups;  // an empty word in a group: it may be missing
  int operands, optional;
  Handler run;
  const char* kind;
};

const char* current_kind;

std::multimap<std::string, Form>& forms() {
  static std::multimap<std::string, Form> table;
  return table;
}

Words split(const std::string& text, char separator) {
  Words words;
  std::istringstream stream(text);
  for (std::string word; std::getline(stream, word, separator);) words.push_back(word);
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
  static const std::map<std::string, bool Inst::*> flags = {
      {"ftz", &Inst::ftz}, {"sat", &Inst::sat}, {"relu", &Inst::relu}, {"wrap", &Inst::wrap}, {"abs", &Inst::absolute},
      {"max", &Inst::largest}, {"NaN", &Inst::keeps_nan}, {"l", &Inst::left}, {"trans", &Inst::transposed},
      {"nc", &Inst::constant}, {"acquire", &Inst::acquires}, {"release", &Inst::releases}, {"relaxed", &Inst::relaxed},
      {"rni", &Inst::integral}, {"rzi", &Inst::integral}, {"rmi", &Inst::integral}, {"rpi", &Inst::integral},
      {"aligned", &Inst::aligned}, {"arrive", &Inst::arrives}, {"red", &Inst::reduces}};
  static const std::map<std::string, Rounding> roundings = {
      {"rn", Rounding::nearest}, {"rz", Rounding::zero}, {"rm", Rounding::down}, {"rp", Rounding::up},
      {"rna", Rounding::away}, {"rni", Rounding::nearest}, {"rzi", Rounding::zero}, {"rmi", Rounding::down},
      {"rpi", Rounding::up}};
  static const std::map<std::string, Space> spaces = {
      {"global", Space::global}, {"const", Space::global}, {"shared", Space::shared}, {"shared::cta", Space::shared},
      {"shared::cluster", Space::shared}, {"local", Space::local}, {"param", Space::param}};
  static const std::map<std::string, Scope> scopes = {  // an ordering without a scope reaches the grid
      {"relaxed", Scope::grid}, {"volatile", Scope::grid}, {"acquire", Scope::grid}, {"release", Scope::grid},
      {"acq_rel", Scope::grid}, {"atom", Scope::grid}, {"red", Scope::grid}, {"cta", Scope::block},
      {"cluster", Scope::cluster}, {"gpu", Scope::grid}, {"gl", Scope::grid}, {"sys", Scope::grid}};
  static const std::map<std::string, u8> relations = {
      {"eq", equal}, {"ne", less | greater}, {"lt", less}, {"le", less | equal}, {"gt", greater},
      {"ge", greater | equal}, {"lo", less}, {"ls", less | equal}, {"hi", greater}, {"hs", greater | equal},
      {"equ", equal | unordered}, {"neu", less | greater | unordered}, {"ltu", less | unordered},
      {"leu", less | equal | unordered}, {"gtu", greater | unordered}, {"geu", greater | equal | unordered},
      {"num", less | equal | greater}, {"nan", unordered}};
  static const std::map<std::string, u8> functions = {
      {"and", 1}, {"or", 2}, {"xor", 3}, {"up", 0}, {"down", 1}, {"bfly", 2}, {"idx", 3}};
  static const std::map<std::string, u8> counts = {{"v2", 2}, {"v4", 4}, {"v8", 8}, {"x2", 2}, {"x4", 4}};
  for (const std::string& word : words) {
    const auto look_up = [&word](const auto& meanings, auto& result) {
      if (const auto found = meanings.find(word); found != meanings.end()) result = found->second;
    };
    if (const auto flag = flags.find(word); flag != flags.end()) inst.*flag->second = true;
    if (word == "acq_rel") inst.acquires = inst.releases = true;
    if (word == "bar") inst.aligned = words[1] != "warp";
    look_up(roundings, inst.rounding);
    look_up(spaces, inst.space);
    look_up(scopes, inst.scope);
    look_up(relations, inst.accepts);
    look_up(functions, inst.function);
    look_up(counts, inst.vec);
  }
}

}  // namespace

void section(const char* kind) { current_kind = kind; }

void on(const std::string& pattern, int operands, Handler run, int optional) {
  Words tokens = split(pattern, ' ');
  Form form{{}, operands, optional, run, current_kind};
  for (size_t k = 1; k < tokens.size(); ++k) {
    const bool may_miss = tokens[k].back() == '?';
    if (may_miss) tokens[k].pop_back();
    form.groups.push_back(split(tokens[k], '|'));
    if (may_miss) form.groups.back().push_back("");
  }
  for (const std::string& name : split(tokens[0], '|')) forms().emplace(name, form);
}

Inst decode(const std::string& opcode, int operands) {
  const Words words = split(opcode, '.');
  const std::string& name = words[0];
  const auto [first, last] = forms().equal_range(name);
  if (first == last) throw std::invalid_argument("unknown instruction '" + name + "'");
  std::string counts;
  for (auto it = first; it != last; ++it) {
    const Form& form = it->second;
    if (!matches(words, 1, form.groups, 0)) continue;
    Inst inst{form.run, form.kind};
    read_modifiers(inst, words);
    inst.operands = u8(operands);
    const int least = form.operands + inst.vec - 1;
    if (operands >= least && operands <= least + form.optional) return inst;
    counts += (counts.empty() ? "" : " or ") + std::to_string(least);
  }
  if (counts.empty()) throw std::invalid_argument("'" + name + "' is known, but not with these modifiers and types");
  throw std::invalid_argument("'" + opcode + "' takes " + counts + " operands, not " + std::to_string(operands));
}
