// libnvrtc.so.13: compiles a kernel file with g++, behind shim.h. What it hands out as cubin is a shared object.

#include <dlfcn.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <condition_variable>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

extern char** environ;

typedef int Result;   // nvrtcResult

namespace {

enum : Result { SUCCESS = 0, INVALID_INPUT = 3, INVALID_PROGRAM = 4, INVALID_OPTION = 5, COMPILATION = 6, INTERNAL_ERROR = 11 };

const int ARCHITECTURES[] = {80, 86, 89, 90, 100, 120};

/// g++ processes at a time.
constexpr int AT_ONCE = 2;

struct Compiled {
    std::string log, image;
    bool done = false;
};

struct Program {
    std::string source, name;
    std::shared_ptr<Compiled> compiled;
};

std::mutex lock;
std::condition_variable changed;
int running = 0;
/// By source and options: several threads that want the same wait for one of them.
std::map<std::string, std::shared_ptr<Compiled>> known;

/// Where this library lies, and shim.h beside it.
std::string folder() {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(folder), &info);
    std::string path = info.dli_fname;
    return path.substr(0, path.rfind('/'));
}

std::string slurp(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
}

/// Runs g++; what it says goes to `log`.
bool compiler(const std::vector<std::string>& arguments, const std::string& log_path, std::string& log) {
    const char* named = getenv("CXX");
    std::vector<std::string> all = {named != nullptr && *named != 0 ? named : "g++"};
    all.insert(all.end(), arguments.begin(), arguments.end());
    std::vector<char*> pointers;
    for (std::string& each : all) pointers.push_back(&each[0]);
    pointers.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 2, log_path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    posix_spawn_file_actions_adddup2(&actions, 2, 1);
    pid_t child;
    int failed = posix_spawnp(&child, pointers[0], &actions, nullptr, pointers.data(), environ);
    posix_spawn_file_actions_destroy(&actions);
    if (failed != 0) {
        log += all[0] + ": " + strerror(failed) + "\n";
        return false;
    }
    int status = -1;
    while (waitpid(child, &status, 0) < 0) {
        if (errno != EINTR) break;
    }
    log += slurp(log_path);
    return status == 0;
}

bool is_word(char c) { return c == '_' || (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

/// From an opening bracket to behind the closing one.
size_t behind_brackets(const std::string& text, size_t at) {
    int depth = 0;
    for (; at < text.size(); at++) {
        if (text[at] == '(') depth++;
        if (text[at] == ')' && --depth == 0) return at + 1;
    }
    return at;
}

/// A line that registers every `__global__` function of preprocessed text, in which that word still stands.
std::string table(const std::string& text) {
    const std::string WORD = "__global__";
    std::string list;
    std::set<std::string> names;
    for (size_t found = text.find(WORD); found != std::string::npos; found = text.find(WORD, found + 1)) {
        // Templates have no name that could be asked for.
        size_t start = found == 0 ? std::string::npos : text.find_last_of(";{}", found - 1);
        if (text.substr(start + 1, found - start - 1).find("template") != std::string::npos) continue;
        std::string word, threads = "0";
        for (size_t at = found + WORD.size(); at < text.size();) {
            if (is_word(text[at])) {
                size_t end = at;
                while (end < text.size() && is_word(text[end])) end++;
                word = text.substr(at, end - at);
                at = end;
            } else if (text[at] == '(') {
                size_t end = behind_brackets(text, at);
                if (word == "__launch_bounds__") {
                    std::string bounds = text.substr(at + 1, end - at - 2);
                    int depth = 0;
                    size_t comma = 0;
                    while (comma < bounds.size() && (depth > 0 || bounds[comma] != ',')) {
                        depth += (bounds[comma] == '(') - (bounds[comma] == ')');
                        comma++;
                    }
                    threads = bounds.substr(0, comma);
                } else if (word != "__attribute__" && word != "alignas") {
                    break;
                }
                at = end;
            } else {
                at++;
            }
        }
        if (names.insert(word).second) list += (list.empty() ? "" : ", ") + ("EMULATED_KERNEL(" + word + ", (" + threads + "))");
    }
    return "\n#line 1 \"table of kernels\"\nEMULATED_MODULE(" + list + ")\n";
}

void compile(const Program& program, const std::vector<std::string>& defines, Compiled& compiled) {
    const char* base = getenv("TMPDIR");
    std::string scratch = std::string(base != nullptr && *base != 0 ? base : "/tmp") + "/pcae-emulator-XXXXXX";
    if (mkdtemp(&scratch[0]) == nullptr) {
        compiled.log = "cannot make a folder " + scratch + ": " + strerror(errno) + "\n";
        return;
    }
    std::string source = scratch + "/kernels.cu", expanded = scratch + "/expanded", image = scratch + "/image", log = scratch + "/log";
    std::ofstream(source, std::ios::binary) << program.source;
    std::vector<std::string> expand = {"-x", "c++", "-std=c++17", "-E", "-P", "-w", "-o", expanded, "-DPCAE_EMULATED"};
    expand.insert(expand.end(), defines.begin(), defines.end());
    expand.push_back(source);
    if (compiler(expand, log, compiled.log)) {
        std::ofstream(source, std::ios::binary | std::ios::app) << table(slurp(expanded));
        std::vector<std::string> build = {
            "-x", "c++", "-std=c++17", "-O1", "-w", "-o", image, "-DPCAE_EMULATED", "-include", folder() + "/shim.h",
            // Kernels of several loaded files must not share anything.
            "-fPIC", "-shared", "-fvisibility=hidden", "-fno-gnu-unique", "-Wl,-Bsymbolic", "-Wl,-z,now",
            // So that .bss holds nothing but arrays in shared memory.
            "-nostartfiles", "-nodefaultlibs", "-fno-threadsafe-statics", "-fno-exceptions", "-fno-rtti",
            // What CUDA allows, or does not do.
            "-fno-strict-aliasing", "-fno-math-errno", "-ffp-contract=off", "-fwrapv",
            // Calls the functions at the end of shim.h.
            "-fsanitize=bounds,alignment,shift,integer-divide-by-zero"};
        build.insert(build.end(), defines.begin(), defines.end());
        build.insert(build.end(), {source, "-lm", "-lc", "-lgcc"});
        if (compiler(build, log, compiled.log)) compiled.image = slurp(image);
    }
    for (const std::string& path : {source, expanded, image, log}) unlink(path.c_str());
    rmdir(scratch.c_str());
}

}  // namespace

EXPORT Result nvrtcVersion(int* major, int* minor) {
    // What a test wants it to be.
    const char* set = getenv("PCAE_EMULATED_NVRTC");
    *major = set != nullptr ? atoi(set) : 13;
    // No version of NVIDIA's, and another one for another emulator: images of these are not each other's.
    *minor = 1000000 + static_cast<int>(EMULATOR_VERSION % 1000000);
    return SUCCESS;
}

EXPORT Result nvrtcGetNumSupportedArchs(int* count) {
    *count = sizeof ARCHITECTURES / sizeof *ARCHITECTURES;
    return SUCCESS;
}

EXPORT Result nvrtcGetSupportedArchs(int* architectures) {
    memcpy(architectures, ARCHITECTURES, sizeof ARCHITECTURES);
    return SUCCESS;
}

EXPORT const char* nvrtcGetErrorString(Result code) {
    return code == SUCCESS ? "NVRTC_SUCCESS" : code == COMPILATION ? "NVRTC_ERROR_COMPILATION" : code == INVALID_OPTION ? "NVRTC_ERROR_INVALID_OPTION" : "NVRTC_ERROR";
}

EXPORT Result nvrtcCreateProgram(void** program, const char* source, const char* name, int headers, const char* const*, const char* const*) {
    if (headers != 0) {
        fprintf(stderr, "emulator: nvrtcCreateProgram with headers is not emulated\n");
        return INVALID_INPUT;
    }
    *program = new Program{source, name != nullptr ? name : "default_program", nullptr};
    return SUCCESS;
}

EXPORT Result nvrtcDestroyProgram(void** program) {
    delete static_cast<Program*>(*program);
    *program = nullptr;
    return SUCCESS;
}

EXPORT Result nvrtcCompileProgram(void* handle, int count, const char* const* options) {
    Program* program = static_cast<Program*>(handle);
    std::vector<std::string> defines;
    std::string key = program->source;
    for (int i = 0; i < count; i++) {
        std::string option = options[i];
        if (option.compare(0, 2, "-D") == 0) {
            defines.push_back(option);
            key = option + "\n" + key;
        } else if (option.compare(0, 22, "--gpu-architecture=sm_") != 0 && option != "--std=c++17") {
            fprintf(stderr, "emulator: nvrtcCompileProgram: option %s is not emulated; add it in nvrtc.cpp\n", option.c_str());
            return INVALID_OPTION;
        }
    }
    std::unique_lock<std::mutex> guard(lock);
    std::shared_ptr<Compiled>& found = known[key];
    if (!found) {
        std::shared_ptr<Compiled> compiled = found = std::make_shared<Compiled>();
        changed.wait(guard, [] { return running < AT_ONCE; });
        running++;
        guard.unlock();
        compile(*program, defines, *compiled);
        guard.lock();
        running--;
        compiled->done = true;
        changed.notify_all();
        program->compiled = compiled;
    } else {
        program->compiled = found;
        changed.wait(guard, [&] { return program->compiled->done; });
    }
    return program->compiled->image.empty() ? COMPILATION : SUCCESS;
}

EXPORT Result nvrtcGetProgramLogSize(void* program, size_t* size) {
    const auto& compiled = static_cast<Program*>(program)->compiled;
    *size = (compiled ? compiled->log.size() : 0) + 1;
    return SUCCESS;
}

EXPORT Result nvrtcGetProgramLog(void* program, char* log) {
    const auto& compiled = static_cast<Program*>(program)->compiled;
    strcpy(log, compiled ? compiled->log.c_str() : "");
    return SUCCESS;
}

EXPORT Result nvrtcGetCUBINSize(void* program, size_t* size) {
    const auto& compiled = static_cast<Program*>(program)->compiled;
    if (!compiled || compiled->image.empty()) return INVALID_PROGRAM;
    *size = compiled->image.size();
    return SUCCESS;
}

EXPORT Result nvrtcGetCUBIN(void* program, char* image) {
    const auto& compiled = static_cast<Program*>(program)->compiled;
    if (!compiled || compiled->image.empty()) return INVALID_PROGRAM;
    memcpy(image, compiled->image.data(), compiled->image.size());
    return SUCCESS;
}
