// Generates with a model that `linattn-compile --plain-abi` wrote, on IREE's C runtime alone: the states that a call
// returns are the arguments of the next call, and nothing of them is copied.
//
//     generate MODEL.vmfb MODEL.abi ID,ID,...
//
// MODEL.abi says what the functions take and give, a line a value: `function kind role type`, for example
// `decode arguments tokens 1x1xi64`. README.md beside this file makes it from the compiler's report. The prompt goes to
// the function prefill_N of its N tokens; then 7 calls of `decode`. Prints the 8 tokens that follow the prompt.
//
// The caller checks its token ids: the manifest's bounds are checked by linattn's Python runtime, not by the module.
#include <iree/runtime/api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_VALUES 512
#define MAX_RANK 8
#define MAX_TOKENS 512
#define NEW_TOKENS 8

typedef struct value_t {
  char function[64], kind[16], role[32], type[128];
} value_t;

typedef struct model_t {
  iree_runtime_session_t* session;
  value_t values[MAX_VALUES];
  int value_count;
  iree_hal_buffer_view_t* states[MAX_VALUES];  // NULL before the first call: zeros
  int64_t position;                            // tokens committed to the states
} model_t;

static iree_status_t read_abi(const char* path, model_t* model) {
  FILE* file = fopen(path, "r");
  if (!file) return iree_make_status(IREE_STATUS_NOT_FOUND, "no such file: %s", path);
  value_t value;
  while (model->value_count < MAX_VALUES &&
         fscanf(file, "%63s %15s %31s %127s", value.function, value.kind, value.role, value.type) == 4) {
    model->values[model->value_count++] = value;
  }
  fclose(file);
  return model->value_count ? iree_ok_status() : iree_make_status(IREE_STATUS_INVALID_ARGUMENT, "empty: %s", path);
}

// Writes integers into an array of i64 or i32, the two types of ids, masks and positions.
static void put(void* data, bool is_wide, iree_host_size_t index, int64_t number) {
  if (is_wide) {
    ((int64_t*)data)[index] = number;
  } else {
    ((int32_t*)data)[index] = (int32_t)number;
  }
}

// A new array for an argument: zeros for a state, else what its role asks for.
static iree_status_t make_argument(model_t* model, const value_t* value, const int64_t* ids, int count,
                                   iree_hal_buffer_view_t** out_view) {
  iree_hal_dim_t shape[MAX_RANK];
  iree_host_size_t rank = 0, elements = 1;
  iree_hal_element_type_t element = IREE_HAL_ELEMENT_TYPE_NONE;
  IREE_RETURN_IF_ERROR(iree_hal_parse_shape_and_element_type(iree_make_cstring_view(value->type), MAX_RANK, &rank,
                                                             shape, &element));
  for (iree_host_size_t i = 0; i < rank; ++i) elements *= shape[i];
  const bool is_wide = element == IREE_HAL_ELEMENT_TYPE_SINT_64 || element == IREE_HAL_ELEMENT_TYPE_INT_64;
  const iree_host_size_t columns = rank ? shape[rank - 1] : 1;
  const iree_host_size_t bytes = elements * iree_hal_element_dense_byte_count(element);
  void* data = calloc(1, bytes ? bytes : 1);
  if (!data) return iree_make_status(IREE_STATUS_RESOURCE_EXHAUSTED, "no memory for %s", value->type);
  for (iree_host_size_t i = 0; i < elements; ++i) {
    const int64_t column = (int64_t)(i % columns), first_new = (int64_t)columns - count;
    if (!strcmp(value->role, "tokens")) put(data, is_wide, i, ids[column]);
    if (!strcmp(value->role, "position_ids")) put(data, is_wide, i, model->position + column);
    if (!strcmp(value->role, "attention_mask")) {  // the cache's columns, of which `position` are filled; the new ones
      put(data, is_wide, i, column < model->position || column >= first_new);
    }
  }
  const iree_hal_buffer_params_t params = {
      .type = IREE_HAL_MEMORY_TYPE_DEVICE_LOCAL,
      .access = IREE_HAL_MEMORY_ACCESS_ALL,
      .usage = IREE_HAL_BUFFER_USAGE_DEFAULT,
  };
  iree_status_t status = iree_hal_buffer_view_allocate_buffer_copy(
      iree_runtime_session_device(model->session), iree_runtime_session_device_allocator(model->session), rank, shape,
      element, IREE_HAL_ENCODING_TYPE_DENSE_ROW_MAJOR, params, iree_make_const_byte_span(data, bytes), out_view);
  free(data);
  return status;
}

static iree_status_t push_arguments(model_t* model, const char* function, const int64_t* ids, int count,
                                    iree_runtime_call_t* call) {
  int state = 0;
  for (int i = 0; i < model->value_count; ++i) {
    const value_t* value = &model->values[i];
    if (strcmp(value->function, function) || strcmp(value->kind, "arguments")) continue;
    if (!strcmp(value->role, "position")) {
      iree_vm_value_t position = iree_vm_value_make_i64(model->position);
      IREE_RETURN_IF_ERROR(iree_vm_list_push_value(iree_runtime_call_inputs(call), &position));
      continue;
    }
    const bool is_state = !strcmp(value->role, "state");
    iree_hal_buffer_view_t* view = is_state ? model->states[state] : NULL;
    if (view) {
      iree_hal_buffer_view_retain(view);
    } else {
      IREE_RETURN_IF_ERROR(make_argument(model, value, ids, count, &view));
    }
    state += is_state;
    iree_status_t status = iree_runtime_call_inputs_push_back_buffer_view(call, view);
    iree_hal_buffer_view_release(view);  // the call keeps it
    IREE_RETURN_IF_ERROR(status);
  }
  return iree_ok_status();
}

// The token with the largest logit of the last position; logits are [1, T, vocabulary] of f32.
static iree_status_t best_token(model_t* model, iree_hal_buffer_view_t* logits, int64_t* out_token) {
  if (iree_hal_buffer_view_element_type(logits) != IREE_HAL_ELEMENT_TYPE_FLOAT_32) {
    return iree_make_status(IREE_STATUS_UNIMPLEMENTED, "this sample reads logits of f32 only");
  }
  const iree_host_size_t rank = iree_hal_buffer_view_shape_rank(logits);
  const iree_host_size_t count = (iree_host_size_t)iree_hal_buffer_view_shape_dim(logits, rank - 1);
  const iree_device_size_t bytes = count * sizeof(float);
  float* row = (float*)malloc(bytes);
  if (!row) return iree_make_status(IREE_STATUS_RESOURCE_EXHAUSTED, "no memory for logits");
  iree_status_t status = iree_hal_device_transfer_d2h(
      iree_runtime_session_device(model->session), iree_hal_buffer_view_buffer(logits),
      iree_hal_buffer_view_byte_length(logits) - bytes, row, bytes, IREE_HAL_TRANSFER_BUFFER_FLAG_DEFAULT,
      iree_infinite_timeout());
  iree_host_size_t best = 0;
  for (iree_host_size_t i = 1; iree_status_is_ok(status) && i < count; ++i) {
    if (row[i] > row[best]) best = i;
  }
  free(row);
  *out_token = (int64_t)best;
  return status;
}

// The first output is taken for the logits; the states replace those before the call.
static iree_status_t take_results(model_t* model, const char* function, iree_runtime_call_t* call, int64_t* out_token) {
  int state = 0;
  bool has_token = false;
  for (int i = 0; i < model->value_count; ++i) {
    const value_t* value = &model->values[i];
    if (strcmp(value->function, function) || strcmp(value->kind, "results")) continue;
    iree_hal_buffer_view_t* view = NULL;
    IREE_RETURN_IF_ERROR(iree_runtime_call_outputs_pop_front_buffer_view(call, &view));
    if (!strcmp(value->role, "state")) {
      iree_hal_buffer_view_release(model->states[state]);
      model->states[state++] = view;
      continue;
    }
    iree_status_t status = has_token ? iree_ok_status() : best_token(model, view, out_token);
    has_token = true;
    iree_hal_buffer_view_release(view);
    IREE_RETURN_IF_ERROR(status);
  }
  return iree_ok_status();
}

static iree_status_t step(model_t* model, const char* function, const int64_t* ids, int count, int64_t* out_token) {
  char name[96];
  snprintf(name, sizeof(name), "linattn.%s", function);
  iree_runtime_call_t call;
  IREE_RETURN_IF_ERROR(iree_runtime_call_initialize_by_name(model->session, iree_make_cstring_view(name), &call));
  iree_status_t status = push_arguments(model, function, ids, count, &call);
  if (iree_status_is_ok(status)) status = iree_runtime_call_invoke(&call, /*flags=*/0);
  if (iree_status_is_ok(status)) status = take_results(model, function, &call, out_token);
  iree_runtime_call_deinitialize(&call);
  model->position += count;
  return status;
}

static iree_status_t generate(model_t* model, int64_t* ids, int count) {
  char function[64] = "decode";
  if (count > 1) snprintf(function, sizeof(function), "prefill_%d", count);
  for (int i = 0; i < NEW_TOKENS; ++i) {
    IREE_RETURN_IF_ERROR(step(model, function, ids, count, &ids[0]));
    printf(i ? " %lld" : "%lld", (long long)ids[0]);
    strcpy(function, "decode");
    count = 1;
  }
  printf("\n");
  return iree_ok_status();
}

static iree_status_t run(iree_runtime_instance_t* instance, char** arguments, model_t* model) {
  int64_t ids[MAX_TOKENS];
  int count = 0;
  for (char* text = strtok(arguments[3], ","); text && count < MAX_TOKENS; text = strtok(NULL, ",")) {
    ids[count++] = strtoll(text, NULL, 10);
  }
  if (!count) return iree_make_status(IREE_STATUS_INVALID_ARGUMENT, "no token ids");
  IREE_RETURN_IF_ERROR(read_abi(arguments[2], model));
  iree_hal_device_t* device = NULL;
  IREE_RETURN_IF_ERROR(
      iree_runtime_instance_try_create_default_device(instance, iree_make_cstring_view("local-task"), &device));
  iree_runtime_session_options_t options;
  iree_runtime_session_options_initialize(&options);
  iree_status_t status = iree_runtime_session_create_with_device(
      instance, &options, device, iree_runtime_instance_host_allocator(instance), &model->session);
  iree_hal_device_release(device);
  IREE_RETURN_IF_ERROR(status);
  IREE_RETURN_IF_ERROR(iree_runtime_session_append_bytecode_module_from_file(model->session, arguments[1]));
  return generate(model, ids, count);
}

int main(int argc, char** argv) {
  if (argc != 4) {
    fprintf(stderr, "usage: %s MODEL.vmfb MODEL.abi ID,ID,...\n", argv[0]);
    return 2;
  }
  static model_t model;
  iree_runtime_instance_options_t options;
  iree_runtime_instance_options_initialize(&options);
  iree_runtime_instance_options_use_all_available_drivers(&options);
  iree_runtime_instance_t* instance = NULL;
  iree_status_t status = iree_runtime_instance_create(&options, iree_allocator_system(), &instance);
  if (iree_status_is_ok(status)) status = run(instance, argv, &model);
  for (int i = 0; i < MAX_VALUES; ++i) iree_hal_buffer_view_release(model.states[i]);
  iree_runtime_session_release(model.session);
  iree_runtime_instance_release(instance);
  if (iree_status_is_ok(status)) return 0;
  iree_status_fprint(stderr, status);
  iree_status_ignore(status);
  return 1;
}
